"""What was thrown at the parsers before (`fuzz.py`) is thrown again: whatever it is, it is read or refused in words."""

import fuzz
import pytest
from needs import need

need("gradio", "gguf")


@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_every_file_of_the_corpus_is_read_or_refused(target):
    files = sorted((fuzz.HERE / target).iterdir())
    assert files
    with fuzz.watched() as folder:
        for file in files:
            try:
                fuzz.run_one(target, file.read_bytes(), folder)
            except Exception as error:
                raise AssertionError(f"{target}/{file.name}: {error!r}") from error


def test_what_a_parser_must_not_do_is_seen(tmp_path):
    import pickle
    import subprocess
    import sys

    with fuzz.watched() as folder:
        (folder / "inside").write_bytes(b"1")
        with pytest.raises(AssertionError, match="writes"):
            (tmp_path / "outside").write_bytes(b"1")
        with pytest.raises(AssertionError, match="Popen"):
            subprocess.run([sys.executable, "-c", "pass"])
        with pytest.raises(AssertionError, match="find_class"):
            pickle.loads(pickle.dumps(fuzz.run_one))
    (tmp_path / "outside").write_bytes(b"1")
