"""Command lines from dataclasses: flags, types, defaults, help and errors."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import pytest

from paged.cli import parse_args
from paged.config import CacheArgs, ModelArgs, RunnerArgs, SchedulerArgs, option, require

ENGINE = (ModelArgs, CacheArgs, SchedulerArgs, RunnerArgs)


@dataclass(frozen=True, kw_only=True)
class Args:
    _argument_group_name: ClassVar[str] = "things"

    input_path: str = field(metadata={"positional": True, "help": "what is read"})
    extra: str = field(default="more.txt", metadata={"positional": True, "help": "what else is read"})
    name: str | None = option(None, "a name; none: nameless")
    count: int | None = option(None, "how many; none: all")
    rate: float = option(0.5, "up to 100% of it")
    mode: Literal["fast", "slow"] = option("slow", "how")
    keep_going: bool = option(False, "do not stop")
    check_first: bool = option(True, "look before the leap")
    many_words: tuple[str, ...] = option(("a", "b"), "several")

    def __post_init__(self) -> None:
        require(self.count is None or self.count > 0, "count", "must be positive")


def parse(*argv: str, types: tuple[type, ...] = (Args,)) -> tuple[Any, ...]:
    return parse_args("prog", "Does it.", *types, argv=argv)


def refused(capsys: pytest.CaptureFixture, *argv: str) -> str:
    with pytest.raises(SystemExit) as e:
        parse(*argv, types=(Args, *ENGINE))
    assert e.value.code == 2
    return capsys.readouterr().err


def help_text(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, columns: int, *types: type) -> list[str]:
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as e:
        parse("--help", types=types)
    assert e.value.code == 0
    return capsys.readouterr().out.splitlines()


def test_no_flags_give_the_dataclasses_defaults() -> None:
    args, *engine = parse("in.txt", types=(Args, *ENGINE))
    assert args == Args(input_path="in.txt")
    assert engine == [t() for t in ENGINE]


@pytest.mark.parametrize("t", ENGINE)
def test_every_field_of_the_engine_can_be_set_to_another_value(t: type) -> None:
    for name, kind in get_type_hints(t).items():
        if get_origin(kind) is ClassVar:
            continue
        (kind,) = [k for k in get_args(kind) if k is not type(None)] if type(None) in get_args(kind) else [kind]
        flag = "--" + name.replace("_", "-")
        if kind is bool:
            value: Any = not getattr(t(), name)
            argv = [flag if value else flag.replace("--", "--no-")]
        else:
            value = get_args(kind)[-1] if get_origin(kind) is Literal else {int: 64, float: 0.25, str: "text"}[kind]
            argv = [flag, str(value)]
        assert parse(*argv, types=(t,)) == (dataclasses.replace(t(), **{name: value}),)


@pytest.mark.parametrize(
    ("argv", "changed"),
    [
        (["b.txt"], {"extra": "b.txt"}),
        (["--name", "n"], {"name": "n"}),
        (["--count=7"], {"count": 7}),
        (["--rate", "-0.2"], {"rate": -0.2}),
        (["--mode", "fast"], {"mode": "fast"}),
        (["--keep-going"], {"keep_going": True}),
        (["--keep-going", "--no-keep-going"], {}),
        (["--no-check-first"], {"check_first": False}),
        (["--no_check_first"], {"check_first": False}),
        (["--keep_going"], {"keep_going": True}),
        (["--many_words", "x", "y", "z"], {"many_words": ("x", "y", "z")}),
    ],
)
def test_flags(argv: list[str], changed: dict[str, Any]) -> None:
    assert parse("in.txt", *argv) == (dataclasses.replace(Args(input_path="in.txt"), **changed),)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "required: INPUT_PATH"),
        (["in", "--count", "0"], "error: --count must be positive"),
        (["in", "--count", "many"], "invalid int value: 'many'"),
        (["in", "--mode", "medium"], "invalid choice: 'medium'"),
        (["in", "--max-model-len", "1"], "error: --max-model-len must be at least 2"),
        (["in", "--max-num-seq", "3"], "unknown flag --max-num-seq; did you mean --max-num-seqs?"),
        (["--max_nun_seqs", "3", "in"], "unknown flag --max-nun-seqs; did you mean --max-num-seqs?"),
        (["in", "--xyzzy=1"], "unknown flag --xyzzy "),
        (["in", "two", "three"], "unrecognized arguments: three"),
    ],
)
def test_errors_name_what_was_typed(capsys: pytest.CaptureFixture, argv: list[str], message: str) -> None:
    err = refused(capsys, *argv)
    assert err.startswith("usage: prog [options] INPUT_PATH EXTRA\n")
    assert message in err


def test_help_is_grouped_one_line_an_option_with_defaults(capsys, monkeypatch) -> None:
    lines = help_text(capsys, monkeypatch, 100, Args, *ENGINE)
    assert [line for line in lines if line.endswith(":")] == [
        "options:",
        "things:",
        "model:",
        "cache:",
        "scheduler:",
        "runner:",
    ]
    for t in (Args, *ENGINE):
        for f in dataclasses.fields(t):
            dashed = f.name.replace("_", "-")
            first_words = {f.name.upper()} if f.metadata.get("positional") else {f"--{dashed}", f"--[no-]{dashed}"}
            (line,) = [line for line in lines if line and line.split()[0] in first_words]
            assert f.metadata["help"] in line
            shown = {True: "on", False: "off"}.get(f.default, f.default) if isinstance(f.default, bool) else f.default
            if f.default in (None, "", dataclasses.MISSING):
                assert "None" not in line
                assert "[" not in line.replace("[no-]", "")
            else:
                assert line.endswith(f"[{' '.join(shown) if isinstance(shown, tuple) else shown}]"), line
    assert not any("_" in line.split()[0] for line in lines if line.startswith("  -")), "flags have dashes only"


def test_help_fits_a_narrow_terminal(capsys, monkeypatch) -> None:
    lines = help_text(capsys, monkeypatch, 70, Args, *ENGINE)
    assert max(map(len, lines)) <= 70
