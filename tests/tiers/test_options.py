from __future__ import annotations

from kvkeep.config import Config
from kvkeep.options import Durability, disk_options


def test_without_a_directory_there_is_no_disk_tier():
    assert disk_options(Config()) is None


def test_every_setting_of_the_disk_reaches_its_tier():
    config = Config(
        disk_path="/a:/b", disk_size="3 MiB", disk_min_free="1 KiB", disk_durability="group", disk_threads=9
    )
    found = disk_options(config)
    assert found is not None
    assert found.directories == ("/a", "/b")
    assert (found.limit_nbytes, found.min_free_nbytes) == (3 << 20, 1 << 10)
    assert (found.durability, found.threads) == (Durability.GROUP, 9)
