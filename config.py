"""
Bad input is refused here. Tests: tests/test_bad_input.py
"""


def require(condition: object, message: str) -> None:
    """Raise ValueError(message) unless the condition holds: bad input, exit code 2.

    The message is one line that starts with the flag and its value and ends with the remedy.
    """
    if not condition:
        raise ValueError(message)
