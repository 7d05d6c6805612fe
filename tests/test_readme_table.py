"""The README's table of estimators is the one that the code prints."""
from pathlib import Path

import pytest

from estimators import estimator_table

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- estimators -->", "<!-- /estimators -->"


def test_the_table_in_the_readme_is_printed_from_the_table_in_the_code():
    """To renew it: python -c "import estimators; print(estimators.estimator_table())"."""
    text = README.read_text(encoding="utf-8") if README.exists() else ""
    if BEGIN not in text or END not in text:
        pytest.skip(f"README.md has no {BEGIN} ... {END}")
    assert text.split(BEGIN)[1].split(END)[0].strip() == estimator_table()
