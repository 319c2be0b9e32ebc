"""Which of a process's memory is pages of a file, and how much of that it shares."""

from __future__ import annotations

from collections import Counter


def mapped(suffix: str) -> Counter[str]:
    """What /proc/self/smaps says of files whose names end so, in bytes: Rss, Pss, Anonymous (copies) and the others."""
    found: Counter[str] = Counter()
    inside = False
    with open("/proc/self/smaps") as smaps:
        for line in smaps:
            key, _, rest = line.partition(" ")
            if not key.endswith(":"):
                inside = line.rstrip().endswith(suffix)
            elif inside and rest.strip().endswith("kB"):
                found[key[:-1]] += 1024 * int(rest.split()[0])
    return found


def pointers(suffix: str) -> list[range]:
    """Addresses at which such files are mapped."""
    with open("/proc/self/maps") as maps:
        areas = [line.split()[0].split("-") for line in maps if line.rstrip().endswith(suffix)]
    return [range(int(first, 16), int(last, 16)) for first, last in areas]
