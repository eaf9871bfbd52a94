"""Which files have a content, which contents have a text, and which files end when: one empty file for each answer.

    uses/<content>/<file id>         a file that has the content; with the suffix .going while the file is deleted
    texts/<SHA-256>/<content>        a content with that text
    ending/<time>.<tenant>.<file id> a file that ends then

So nobody has to read the records of all files. The caller holds the folder's lock, except for `ended`.
"""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import takewhile
from pathlib import Path

_GOING = ".going"


class Index:
    """The index in ``folder``, which holds the files of a `deployments.files.store.FileStore`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def is_missing(self) -> bool:
        """Whether the files were stored by a version that had no index."""
        return not (self._folder / "uses").is_dir()

    def build(self, files: Iterable[tuple[str, str, bool]], texts: Iterable[tuple[str, str]]) -> None:
        """Makes the index of ``files`` (content, file, whether it is going) and ``texts`` (text, content)."""
        for text, content in texts:
            _touch(self._folder / "texts" / text / content)
        unfinished = Index(self._folder / ".index")
        unfinished._folder.mkdir(exist_ok=True)
        (unfinished._folder / "uses").mkdir(exist_ok=True)
        for content, file, is_going in files:
            _touch(unfinished._use(content, file + _GOING * is_going))
        (unfinished._folder / "uses").rename(self._folder / "uses")
        unfinished._folder.rmdir()

    def add(self, content: str, text: str, file: str) -> None:
        """``file`` has ``content``, and that has ``text``."""
        _touch(self._use(content, file))
        _touch(self._folder / "texts" / text / content)

    def retire(self, content: str, file: str) -> None:
        """``file`` is being deleted."""
        with suppress(FileNotFoundError):  # it is already
            self._use(content, file).rename(self._use(content, file + _GOING))

    def is_staying(self, content: str) -> bool:
        """Whether a file has ``content`` that is not being deleted."""
        return not all(name.endswith(_GOING) for name in self._names(f"uses/{content}"))

    def is_the_last(self, content: str, file: str) -> bool:
        """Whether no file but ``file`` has ``content``, not even one that is being deleted."""
        return all(name.removesuffix(_GOING) == file for name in self._names(f"uses/{content}"))

    def remove(self, content: str, file: str) -> None:
        """``file`` does not have ``content`` any more."""
        self._use(content, file).unlink(missing_ok=True)
        self._use(content, file + _GOING).unlink(missing_ok=True)
        _remove_empty(self._folder / "uses" / content)

    def contents_with(self, text: str) -> list[str]:
        """The contents that have ``text``; some of them may be gone."""
        return list(self._names(f"texts/{text}"))

    def remove_text(self, text: str, content: str) -> None:
        """``content`` is gone."""
        (self._folder / "texts" / text / content).unlink(missing_ok=True)
        _remove_empty(self._folder / "texts" / text)

    def ends(self, time: int, tenant: str, file: str) -> None:
        """``file`` of ``tenant`` ends at ``time``, in seconds since 1970."""
        _touch(self._ending(time, tenant, file))

    def ended(self, now: float) -> list[tuple[str, str]]:
        """(tenant, file) of all that should have ended by ``now``, the oldest first."""
        names = (name.split(".") for name in sorted(self._names("ending")))
        return [(tenant, file) for _, tenant, file in takewhile(lambda parts: int(parts[0]) <= now, names)]

    def remove_end(self, time: int, tenant: str, file: str) -> None:
        """``file`` is gone."""
        self._ending(time, tenant, file).unlink(missing_ok=True)

    def _use(self, content: str, name: str) -> Path:
        return self._folder / "uses" / content / name

    def _ending(self, time: int, tenant: str, file: str) -> Path:
        return self._folder / "ending" / f"{time:012d}.{tenant}.{file}"

    def _names(self, place: str) -> Iterator[str]:
        with suppress(FileNotFoundError):
            yield from (path.name for path in (self._folder / place).iterdir())


def _touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):  # it is not empty, or gone
        folder.rmdir()
