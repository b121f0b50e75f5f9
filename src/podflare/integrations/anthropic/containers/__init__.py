"""Containers: sandboxes under the ids that clients of the hosted tool hold, and the files that go in and out.

Does what `hosted` decides, through the asynchronous SDK.  Knows nothing of HTTP, nor of the model.
"""
