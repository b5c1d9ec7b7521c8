import pytest

from iresnet_jax.files import replacing


def test_a_file_is_replaced_when_it_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with replacing(path) as incoming:
        incoming.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail(incoming):
        incoming.write_text("n")
        raise OSError("no room left on the disk")

    with pytest.raises(OSError, match="disk"), replacing(path) as incoming:
        fail(incoming)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
