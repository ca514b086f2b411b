"""docs/adding-a-model.md shows the diff that added a family: what it shows is what is there."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def test_the_diffs_are_of_the_code_as_it_is() -> None:
    page = (ROOT / "docs" / "adding-a-model.md").read_text()
    diffs = re.findall(r"```diff\n--- [^\n]*\n\+\+\+ b/([^\n]*)\n(.*?)```", page, re.DOTALL)
    assert len(diffs) == 3
    for path, body in diffs:
        code = (ROOT / path).read_text()
        shown = [line[1:] for line in body.splitlines()]
        assert all(f"\n{line}\n" in f"\n{code}" for line in shown), f"{path} has changed: show it as it is now"
