"""Not enough memory: how it is recognised."""

import errno


def is_out_of_memory(error: BaseException) -> bool:
    """Was there not enough memory (of a GPU, of the machine, or under the limits of `ulimit`), or no room for another
    thread? PyTorch and the libraries say so with many kinds of errors."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # the latter is torch's
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    text = str(error).lower()
    return not isinstance(error, ValueError) and any(words in text for words in (
        "can't allocate memory", "cannot allocate memory", "not enough memory", "paging file", "bad_alloc",
        "bad allocation", "can't start new thread", "thread creation failed"))
