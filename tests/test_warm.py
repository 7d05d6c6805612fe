"""The warm server: its copies are commands as the shell starts them."""
import subprocess
import sys
import time

import pytest

from tests.runs import Process, complete

CODE = "import os, sys; print(sys.argv, os.getcwd(), os.environ.get('SAID')); print('no', file=sys.stderr); sys.exit(3)"


def test_a_copy_has_the_arguments_the_folder_and_the_end_of_a_command(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("from beside import x\n" + CODE.replace("sys.argv", "sys.argv, x, __name__, __file__"))
    (tmp_path / "beside.py").write_text("x = 5\n")
    for command in ([sys.executable, "-c", CODE, "a"], [sys.executable, str(script), "b"],
                    [sys.executable, "-c", "1/0"]):
        how = dict(cwd=tmp_path, env={"SAID": "yes", "PATH": "/bin"})
        ours = complete(command, **how)
        theirs = subprocess.run(command, **how, text=True, capture_output=True)
        assert (ours.returncode, ours.stdout) == (theirs.returncode, theirs.stdout)
        assert ours.stderr.splitlines()[-1] == theirs.stderr.splitlines()[-1]


def test_no_module_of_the_project_is_there_before_it_is_imported():
    assert complete([sys.executable, "-c", "import sys; print('learner' in sys.modules, 'torch' in sys.modules)"]
                    ).stdout == "False True\n"


def test_a_copy_that_is_killed_or_takes_too_long_says_so():
    process = Process([sys.executable, "-c", "import time; time.sleep(60)"])
    with pytest.raises(subprocess.TimeoutExpired):
        process.communicate(timeout=0.2)
    assert process.poll() is None
    process.kill()
    began = time.monotonic()
    assert process.wait(10) == -9 and time.monotonic() - began < 5
