"""The command `kvik`, and `python -m kvik`."""

try:
    import signal
except KeyboardInterrupt:
    raise SystemExit(130) from None


def main() -> None:
    """Run the command line, which Ctrl-C ends without a traceback from here on, whatever Python is importing.

    Before this Python itself starts, and what Ctrl-C does then is not ours to say.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else somebody has it ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from kvik.cli.app import main as run

    run()


if __name__ == "__main__":
    main()
