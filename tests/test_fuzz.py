"""What was thrown at the parsers before (`fuzz.py`) is thrown again: whatever it is, it is read or refused in words."""

import fuzz
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
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


@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_damaged_files_and_any_bytes_are_read_or_refused(target):
    files = [file.read_bytes() for file in sorted((fuzz.HERE / target).iterdir())]

    @settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(files), st.sampled_from(files), st.binary(max_size=40), st.data())
    def throw(one, other, bytes_between, data):
        first = data.draw(st.integers(0, len(one)))
        last = data.draw(st.integers(0, len(other)))
        fuzz.run_one(target, one[:first] + bytes_between + other[last:], folder)

    with fuzz.watched() as folder:
        throw()


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
