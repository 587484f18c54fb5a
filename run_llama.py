"""The entry point: read the command line, run the command that was asked for, turn errors into exit codes.

    python run_llama.py --option finetune --lr 1e-5 --hidden_dropout_prob 0.8 --use_gpu
    python run_llama.py --help
"""

import os
import signal
import sys
from importlib import import_module

from config import InputError, parse_args
from formats.memory import is_out_of_memory
from training import clock, logs, streams

# A command is imported when it is asked for: torch alone takes two seconds, and --help answers at once.


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0 when the work is done, 2 for bad input, 3 for a run that
    diverged, 130 after ^C, 141 when the reader of the results has left."""
    streams.open_streams()
    with streams.checked_streams():
        try:
            code = answer(argv)
            sys.stdout.flush()
            return code
        except BrokenPipeError:  # the reader of our stdout has left (`| head`): what a shell says of such an end
            streams.to_nowhere(sys.stdout)
            return 128 + 13  # SIGPIPE
        except OSError as error:  # of the last flush
            return refuse(message_of(error))
        except KeyboardInterrupt:
            with streams.undisturbed():
                logs.notice("interrupted")
            return 130


def answer(argv: list[str] | None) -> int:
    """`main` without its streams: errors that a person can do something about are one message, and code 2."""
    words = sys.argv[1:] if argv is None else argv
    try:
        config = parse_args(words or ["--help"], needs_command=True)
    except SystemExit:  # of --help, or of a bad option, which has been said
        streams.flush_stdout()  # argparse keeps an error of it to itself
        raise
    clock.begin_command()
    try:
        with logs.doing("loading the program"):
            command = import_module(f"commands.{'finetune' if config.resume else config.option}")
        return command.run(config)
    except BrokenPipeError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            said = str(error).strip().partition("\n")[0][:200] or type(error).__name__
            return refuse(f"out of memory ({said}); close other programs, or try a smaller --batch_size (with "
                          "--grad_accum the effective batch stays), a smaller --max_sentence_len, or fewer --n_layers")
        if isinstance(error, InputError | OSError):
            return refuse(message_of(error))
        raise


def refuse(message: str) -> int:
    """Say what is wrong; the exit code for it."""
    logs.notice(f"run_llama.py: error: {message}")
    return 2


def message_of(error: Exception) -> str:
    """What an error says; the operating system's own ones with the file in front."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}; check the path and its permissions"
    return str(error)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # in front of main's first line, or behind its last
        sys.exit(130)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # while the interpreter ends, ^C would only add a traceback
