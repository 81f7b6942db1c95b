"""The tree of errors is the one that its docstring draws, and the system's refusals become its leaves."""

import ast
import errno
import os
import re
from pathlib import Path

import pytest
from ordinary import ordinary_user

from marrow.core import errors
from marrow.core.errors import (
    DiskFull,
    Interrupted,
    MarrowError,
    NotPermitted,
    RequestError,
    SourceError,
    UsageError,
    explain_os_errors,
)

CLASSES = {
    name: value
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, Exception) and value.__module__ == errors.__name__
}


def drawn_tree() -> dict[str, str]:
    """Return {class: parent} as drawn: a branch's parent is the last name further left."""
    tree: dict[str, str] = {}
    above: list[tuple[int, str]] = []
    for line in errors.__doc__.splitlines():
        match = re.match(r"    ([|` -]*)([A-Z]\w+)  ", line)
        if match:
            depth = len(match[1])
            above = [(left, name) for left, name in above if left < depth]
            tree[match[2]] = above[-1][1] if above else "Exception"
            above.append((depth, match[2]))
    return tree


def test_the_docstring_draws_every_class_under_its_parent():
    actual = {name: kind.__base__.__name__ for name, kind in CLASSES.items() if kind is not Interrupted}
    assert len(actual) > 10
    assert drawn_tree() == actual


def test_exit_codes_are_those_that_the_docstring_names():
    for name, kind in CLASSES.items():
        expected = 130 if kind is Interrupted else 2 if issubclass(kind, UsageError) else 1
        assert kind.exit_code == expected, name
    assert not issubclass(Interrupted, MarrowError)  # `except MarrowError` is not for the user's Ctrl-C


@pytest.mark.parametrize("kind", [kind for kind in CLASSES.values() if issubclass(kind, MarrowError)])
def test_an_error_shows_its_message_and_its_hint(kind):
    assert str(kind("it broke")) == "it broke"
    error = kind("it broke", hint="mend it")
    assert str(error) == "it broke\nhint: mend it"
    assert (error.message, error.hint) == ("it broke", "mend it")


def test_a_refused_request_carries_its_status_and_parameter():
    error = RequestError("too long", hint="shorten it", status=413, param="prompt")
    assert (error.status, error.param, str(error)) == (413, "prompt", "too long\nhint: shorten it")
    assert RequestError("bad").status == 400


EXPECTED = {
    errno.ENOSPC: DiskFull,
    errno.EDQUOT: DiskFull,
    errno.EACCES: NotPermitted,
    errno.EPERM: NotPermitted,
    errno.EROFS: NotPermitted,
    errno.ENOENT: SourceError,
    errno.ENOTDIR: SourceError,
    errno.EISDIR: SourceError,
    errno.EEXIST: SourceError,
}


@pytest.mark.parametrize("number", EXPECTED, ids=errno.errorcode.get)
def test_each_refusal_of_the_system_becomes_its_error(number):
    cause = OSError(number, os.strerror(number), "/some/file")
    with (
        pytest.raises(EXPECTED[number], match=r"cannot save it: .*/some/file") as caught,
        explain_os_errors("save it", Path("/other")),
    ):
        raise cause
    assert type(caught.value) is EXPECTED[number]
    assert caught.value.hint
    assert caught.value.__cause__ is cause


@pytest.mark.parametrize("number", [errno.EIO, errno.EADDRINUSE, errno.EINTR, errno.EMFILE])
def test_other_refusals_pass_unchanged(number):
    cause = OSError(number, os.strerror(number))
    with pytest.raises(OSError, match=re.escape(os.strerror(number))) as caught, explain_os_errors("x", "y"):
        raise cause
    assert caught.value is cause


def test_without_a_file_name_the_given_path_is_named():
    with pytest.raises(DiskFull, match="no space left at /here"), explain_os_errors("save", "/here"):
        raise OSError(errno.ENOSPC, "full")


def test_a_temporary_is_not_named_but_its_target():
    temporary, target = "/here/.tmp-1-abc", "/here/table"
    with pytest.raises(SourceError, match=f"x: {target}: "), explain_os_errors("x", "/here"):
        raise NotADirectoryError(errno.ENOTDIR, "not a directory", temporary, None, target)
    with pytest.raises(DiskFull, match="no space left at /here/table"), explain_os_errors("x", target):
        raise OSError(errno.ENOSPC, "full", temporary)


def test_other_exceptions_pass_unchanged():
    with pytest.raises(KeyError), explain_os_errors("save", "/here"):
        raise KeyError
    inner = SourceError("already explained")
    with pytest.raises(SourceError) as caught, explain_os_errors("save", "/here"):
        raise inner
    assert caught.value is inner


def test_real_refusals_of_this_system(tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(SourceError, match=r"no such file.*"), explain_os_errors("read", tmp_path):
        (tmp_path / "none").read_text()
    with pytest.raises(SourceError, match="not a directory"), explain_os_errors("read", tmp_path):
        (file / "below").read_text()
    with pytest.raises(SourceError, match="is a directory"), explain_os_errors("read", tmp_path):
        tmp_path.read_text()
    with pytest.raises(DiskFull, match="/dev/full"), explain_os_errors("write", "/dev/full"):
        Path("/dev/full").write_text("x")


def test_a_folder_without_permission_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with (
        ordinary_user(),
        pytest.raises(NotPermitted, match=re.escape(str(tmp_path))),
        explain_os_errors("write", tmp_path),
    ):
        (tmp_path / "file").write_text("x")


@pytest.mark.slow
def test_every_error_in_the_source_that_a_user_can_act_on_has_a_message():
    """Every `raise SomeMarrowError(...)` in the package passes at least a message."""
    package = Path(errors.__file__).parents[1]
    raised = 0
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                name = getattr(node.exc.func, "id", None)
                if name in CLASSES and name != "Interrupted":
                    raised += 1
                    assert node.exc.args, f"{path}:{node.lineno}: {name} without a message"
    assert raised > 10


@pytest.mark.parametrize(("doing", "said"), [("read the source", "readable"), ("write rows", "writable")])
def test_the_hint_of_a_missing_permission_is_for_what_was_done(doing, said):
    with pytest.raises(NotPermitted) as caught, explain_os_errors(doing, "here"):
        raise PermissionError(errno.EACCES, "no")
    assert said in str(caught.value.hint)
