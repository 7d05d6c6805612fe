"""import-linter agrees with tests/test_structure.py about which imports point down."""
import pytest

from tests.lint_imports import check, prefixed
from tests.test_structure import BAD, ROOMS, grow

UPWARD = [files for rule, files, _ in BAD if rule == "direction"]
CIRCLES = [{"models/head.py": "import models.lora", "models/lora.py": "import models.head"},
           {"models/head.py": "from . import lora", "models/lora.py": "from .head import x"},
           {"control/plan.py": "def f():\n    from control import dryrun",
            "control/dryrun.py": "from typing import TYPE_CHECKING\n"
                                 "if TYPE_CHECKING:\n    import control.plan"}]


@pytest.mark.parametrize("files", UPWARD + CIRCLES, ids=lambda files: "-".join(files))
def test_a_broken_contract_is_reported(tmp_path, files):
    grow(tmp_path, ROOMS)
    assert check(tmp_path).returncode == 0
    grow(tmp_path, files)
    done = check(tmp_path)
    assert done.returncode == 1 and "BROKEN" in done.stdout, done.stdout + done.stderr


def test_imports_of_the_core_get_a_prefix_and_nothing_else_moves():
    text = ('"""import cache"""\nimport os, cache, models.head as head  # ä\n'
            "from   cache import (Slots,\n    Segment)\nfrom torch import cache\n"
            "if 'ä': import cache as c\nfrom . import cache\n")
    assert prefixed(text, {"cache", "models"}, "tree") == (
        '"""import cache"""\nimport os, tree.cache, tree.models.head as head  # ä\n'
        "from   tree.cache import (Slots,\n    Segment)\nfrom torch import cache\n"
        "if 'ä': import tree.cache as c\nfrom . import cache\n")
