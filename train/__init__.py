"""The reference trainer; it runs from the checkout and is never installed.

This file makes it a package in its own right: without it, any other `train` that is installed would be found instead.
"""
