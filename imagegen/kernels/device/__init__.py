"""The code that runs on the device. Only these modules import triton, and only a launch imports them.

Every masked load says what it reads outside (`other=`): without it the compiler may leave anything there.
"""
