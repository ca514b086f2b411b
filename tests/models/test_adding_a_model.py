"""docs/adding-a-model.md shows the diff that added a family: what it shows is what is there."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def test_the_diffs_are_of_the_code_as_it_is() -> None:
    page = (ROOT / "docs" / "adding-a-model.md").read_text()
    diffs = re.findall(r"```diff\n--- ([^\n]*)\n\+\+\+ b/([^\n]*)\n(.*?)```", page, re.DOTALL)
    assert len(diffs) == 3
    for old, path, body in diffs:
        code = (ROOT / path).read_text()
        shown = "".join(line[1:] + "\n" for line in body.splitlines())
        if old == "/dev/null":
            assert shown == code
        else:
            assert all(f"\n{line}\n" in code for line in shown.splitlines()), path
