"""The REPL's global variables as data: read (fingerprint), remembered (bases), packed for another REPL (parcel).

All of it runs in the REPL's process, beside user code and on its objects, which may do anything when they are touched.
"""
