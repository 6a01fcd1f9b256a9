import io

from lab.progress import ProgressLine


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_each_stage_once() -> None:
    stream = io.StringIO()
    with ProgressLine(stream) as progress:
        for step in range(1, 500):
            progress(f"build qemu (patched) {step}/1343")
        progress("install")

    assert stream.getvalue() == "build qemu (patched) 1/1343\ninstall\n"


def test_a_terminal_gets_one_line_that_vanishes() -> None:
    stream = Terminal()
    with ProgressLine(stream) as progress:
        progress("one")
        progress("two")

    assert "\n" not in stream.getvalue()
    assert stream.getvalue().endswith("\r\x1b[K")
