"""The pieces of batch scoring: the listing, its shards and the part files."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refract.pipeline.data.manifest import DataError
from refract.pipeline.inference.batch import part_files
from refract.pipeline.inference.batch.listing import Listing, Row, listing_of


def test_a_listing_is_reproducible_and_its_digest_covers_its_rows(tmp_path: Path) -> None:
    for name in ("b/2.png", "b/1.PNG", "a.jpg", "b/.x/3.png", "b/.4.png", "b/3.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    listing = listing_of(tmp_path)
    assert [row.path for row in listing.rows] == [f"{tmp_path}/{name}" for name in ("a.jpg", "b/1.PNG", "b/2.png")]
    assert listing.digest() == listing_of(tmp_path).digest()
    (tmp_path / "c.png").write_bytes(b"")
    assert listing.digest() != listing_of(tmp_path).digest()


def test_linked_folders_are_read_as_training_reads_them_and_each_once(tmp_path: Path) -> None:
    (tmp_path / "elsewhere" / "red").mkdir(parents=True)
    (tmp_path / "elsewhere" / "red" / "a.png").write_bytes(b"")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "red").symlink_to(tmp_path / "elsewhere" / "red")
    (tmp_path / "elsewhere" / "red" / "round").symlink_to(tmp_path / "data")
    assert [row.path for row in listing_of(tmp_path / "data").rows] == [f"{tmp_path}/data/red/a.png"]


@given(count=st.integers(1, 200), size=st.integers(1, 70))
def test_shards_partition_the_listing(count: int, size: int) -> None:
    rows = tuple(Row(f"{i}.png") for i in range(count))
    shards = list(Listing("s", "/", rows).shards(size))
    assert sum((shard.rows for shard in shards), ()) == rows
    assert [shard.start for shard in shards] == [shard.number * size for shard in shards]


def test_a_damaged_part_is_scored_again(tmp_path: Path) -> None:
    import pyarrow as pa

    table = pa.table({"row": [0, 1]})
    part_files.write_part(tmp_path, "k", 0, table)
    file = part_files.part_of(tmp_path, "k", 0)
    assert part_files.is_whole(file, 2) and not part_files.is_whole(file, 3) and not file.exists()
    file.write_bytes(b"PAR1 half of it")
    assert not part_files.is_whole(file, 2) and not file.exists()
    part_files.write_part(tmp_path, "k", 0, table)
    with pytest.raises(DataError, match="unexpected rows or columns"):
        part_files.assemble(
            tmp_path, [file, file], tmp_path / "out.parquet", table.schema, rows=4, visit=lambda _: None
        )
    assert not file.exists() and not (tmp_path / "out.parquet").exists()


def test_any_damage_of_a_part_only_causes_that_part_to_be_scored_again(tmp_path: Path) -> None:
    import pyarrow as pa

    part_files.write_part(tmp_path, "k", 0, pa.table({"row": [0, 1], "label": ["a", "b"]}))
    file = part_files.part_of(tmp_path, "k", 0)
    whole = file.read_bytes()
    for place in range(len(whole)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0x80]) + whole[place + 1 :])
        assert part_files.is_whole(file, 2) == file.exists()
