"""What the hosted code execution tool looks like from outside, and how it is made of client tools.

Pure: requests, responses and stream events come in and go out as values.  Knows no sandbox, no HTTP, no clock.
"""
