import pytest

from lab import errors


def all_errors() -> list[type[errors.LabError]]:
    found = [errors.LabError]
    for kind in found:
        found += kind.__subclasses__()
    return found


@pytest.mark.parametrize("kind", all_errors())
def test_every_error_is_one_line_with_cause_and_remedy(kind: type[errors.LabError]) -> None:
    error = kind("it broke\n  badly", "mend\nit")

    assert str(error) == "it broke badly; mend it"
    assert (error.cause, error.remedy) == ("it broke badly", "mend it")


def test_an_error_without_a_remedy_is_its_cause() -> None:
    assert str(errors.LabError("it broke")) == "it broke"


def test_what_will_fail_again_exits_with_2_and_the_rest_with_1() -> None:
    lasting = {kind.__name__ for kind in all_errors() if kind.exit_status == 2}

    assert lasting == {"HostError", "UsageError"}
    assert {kind.exit_status for kind in all_errors()} == {1, 2}


def test_a_launch_error_carries_its_evidence() -> None:
    error = errors.LaunchError("died", command=["qemu", "-x"], log_tail="bad -x", exit_code=1)

    assert (error.command, error.log_tail, error.exit_code) == (["qemu", "-x"], "bad -x", 1)


def test_the_tree_in_the_docstring_names_every_error() -> None:
    assert errors.__doc__ is not None
    assert all(kind.__name__ in errors.__doc__ for kind in all_errors())
