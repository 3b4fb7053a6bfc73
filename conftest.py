"""What all tests need before they are collected."""

import signal

# A shell starts background jobs with Ctrl-C ignored, and children inherit that; tests of Ctrl-C
# need what a terminal gives.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
