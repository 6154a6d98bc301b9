"""What is said in a video: subtitle files read line by line, and an index of each that finds words within a window.

Read are SRT, WebVTT, ASS/SSA and the other forms of `pysubs2`, and two forms of JSON: LongVideoBench's list of
``{"start", "end", "line"}`` or ``{"timestamp": [start, end], "text"}``, and Whisper's ``{"segments": [...]}``. An index
is a SQLite file with a full-text table (FTS5): it opens at once, and memory does not grow with its length.
"""

from __future__ import annotations

import functools
import math
import os
import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from timesearch.base.batch import BatchResult, Failure, Made, run_batch
from timesearch.base.digests import remembered
from timesearch.base.errors import ItemError
from timesearch.base.exclusive import exclusive
from timesearch.base.files import atomic_path, inside, json_digest
from timesearch.base.stopping import NEVER, Stop
from timesearch.base.untrusted import UntrustedError, marked_encoding, mend_text, parse_json
from timesearch.data.rows import read_all_samples
from timesearch.settings import Settings
from timesearch.video.probe import check_readable, open_video, probe

if TYPE_CHECKING:
    from av.container import InputContainer

    from timesearch.video.speech import Speech

SUFFIXES = (".srt", ".vtt", ".ass", ".ssa", ".json")
"""What the name of a subtitle file beside a video ends with, the preferred form first."""
LINE_CHARS = 500
"""Characters of a line that are kept: a longer one is no line that somebody says."""
_MAX_BYTES = 16 * 2**20
"""Bytes of a subtitle file at most: 8 hours of talk take 2."""
_RAW_CHARS = 4000
"""Characters of a line of the file that its reader gets to see, markup included."""
_MAX_SECONDS = 7 * 24 * 3600.0
_LATE = 60.0
"""Seconds after the end of a video from which a line is taken for another video's."""
_FORMAT = 1
_PICTURES = ("dvd_subtitle", "hdmv_pgs_subtitle", "dvb_subtitle", "xsub", "dvb_teletext")
"""Streams of pictures of words, which nothing here reads."""
_WORD = re.compile(r"\w++")
_CLOCK = re.compile(r"\s*+(?:(\d{1,3}):)?(\d{1,3}):(\d{1,2}(?:[.,]\d{1,6})?)\s*+")
_TAG = re.compile(r"<[^<>]{0,200}>|\{\\[^{}]{0,200}\}")
"""Marks of HTML and of ASS."""


@dataclass(frozen=True)
class Line:
    """Words, and when they are said (s)."""

    start: float
    end: float
    text: str


@dataclass(frozen=True)
class Transcript:
    """The lines of a subtitle file in order of time, and what was wrong with others, a sentence a kind."""

    lines: tuple[Line, ...]
    problems: tuple[str, ...] = ()


def find_subtitles(video: Path) -> Path | None:
    """The subtitle file beside a video: ``talk.srt`` or, in a language, ``talk.en.srt`` for ``talk.mp4``."""
    stem = f"{video.stem}."
    try:
        listed = _listed(video.parent, video.parent.stat().st_mtime_ns)
    except OSError:
        return None
    named = [name for name in listed if name.startswith(stem)]
    named.sort(key=lambda name: (name.count(".") > stem.count("."), SUFFIXES.index(Path(name).suffix.lower()), name))
    return next((video.parent / name for name in named if (video.parent / name).is_file()), None)


@functools.lru_cache(maxsize=4)
def _listed(folder: Path, changed_ns: int) -> list[str]:
    """Names in a folder that may be those of subtitles; read once for all videos in it, until it changes.

    What downloaders tell about a video (``talk.info.json``) is none.
    """
    named = (path for path in folder.iterdir() if not path.name.lower().endswith(".info.json"))
    return [path.name for path in named if path.suffix.lower() in SUFFIXES]


def read_subtitles(path: Path, duration: float | None = None, offset: float = 0.0) -> Transcript:
    """Read a subtitle file.

    Lines whose end lies before their start or whose time is none are left out, as are those that say nothing; a line
    that repeats the one before it (captions that roll up) is kept once.

    Args:
        path: the file; UTF-8, or UTF-16 and UTF-32 with a byte-order mark, else the Windows form of Latin-1.
        duration: length of the video (s): lines more than a minute after its end are named as another video's.
        offset: seconds that the video begins after the subtitles' zero, as where it was cut out of a longer one.

    Raises:
        ItemError: `bad_subtitles`, the file cannot be read or has no line.
    """
    try:
        size = path.stat().st_size
        data = path.read_bytes() if size <= _MAX_BYTES else b""
    except (OSError, ValueError) as error:
        raise _bad(path, f"cannot be read ({error})") from error
    if size > _MAX_BYTES:
        raise _bad(path, f"are {size / 2**20:.0f} MiB long: {_MAX_BYTES // 2**20} at most are read")
    text, problems = _decoded(data)
    try:
        raw = list(_from_json(text)) if path.suffix.lower() == ".json" else list(_from_text(text, path.suffix))
    except UntrustedError as error:
        raise _bad(path, f"are in no form that is read ({error})") from error
    return _ordered(path, raw, problems, duration, offset)


def read_embedded(video: Path, duration: float | None = None, offset: float = 0.0) -> Transcript | None:
    """Read the first subtitle stream of text inside a video; None where it has none.

    Args:
        video: the file.
        duration: its length (s).
        offset: time of its first frame on the container's clock (s).

    Raises:
        ItemError: `bad_subtitles`, the stream has no usable line; or the video cannot be opened.
    """
    import av

    with open_video(video) as container:
        texts = _text_streams(container)
        if not texts:
            return None
        raw: list[tuple[Any, Any, str]] = []
        try:
            for packet in container.demux(texts[0]):
                if packet.pts is None or packet.time_base is None:
                    continue
                start = float(packet.pts * packet.time_base)
                end = start + float((packet.duration or 0) * packet.time_base)
                for part in packet.decode():
                    said = getattr(part, "dialogue", b"")
                    raw.append((start, end, _TAG.sub("", said.decode(errors="replace").replace("\\N", "\n"))))
        except av.FFmpegError:
            pass  # the stream ends here: what came before is kept
    return _ordered(video, raw, [], duration, offset)


def has_embedded(video: Path) -> bool:
    """Whether a video has a subtitle stream of text inside.

    Raises:
        ItemError: the video cannot be opened.
    """
    with open_video(video) as container:
        return bool(_text_streams(container))


def _text_streams(container: InputContainer) -> list[Any]:
    return [stream for stream in container.streams.subtitles if stream.codec_context.name not in _PICTURES]


def _bad(path: Path, what: str) -> ItemError:
    return ItemError(f"the subtitles {path} {what}: mend the file, or take it away", reason="bad_subtitles")


def _decoded(data: bytes) -> tuple[str, list[str]]:
    encoding = marked_encoding(data)
    if encoding is None and (guessed := _unmarked_utf16(data)):
        return data.decode(guessed, errors="replace"), ["it is UTF-16 text without a byte-order mark: read as such"]
    encoding = encoding or "utf-8-sig"
    try:
        return data.decode(encoding), []
    except UnicodeDecodeError:
        return data.decode("cp1252", errors="replace"), [f"it is not {encoding.upper()[:6]} text: read as Windows-1252"]


def _unmarked_utf16(data: bytes) -> str | None:
    """The byte order of UTF-16 text without a mark: every other byte of its times and line ends is zero."""
    head = data[:4000]
    high, low = head[::2].count(0), head[1::2].count(0)
    if max(high, low) < len(head) / 10 or min(high, low) > max(high, low) / 10:
        return None
    return "utf-16-be" if high > low else "utf-16-le"


def _from_text(text: str, suffix: str) -> Iterator[tuple[Any, Any, str]]:
    """(start, end, words) of the lines of a file in a form of pysubs2, told by its text, else by its name."""
    import pysubs2
    from pysubs2.exceptions import FormatAutodetectionError

    bounded = "\n".join(line[:_RAW_CHARS] for line in text.replace("\0", " ").splitlines())
    try:
        try:
            events = pysubs2.SSAFile.from_string(bounded).events
        except FormatAutodetectionError:
            events = pysubs2.SSAFile.from_string(bounded, format_=suffix.lower().removeprefix(".")).events
    except Exception as error:  # pysubs2 stumbles over foreign text in ways that it does not name
        raise UntrustedError(f"{type(error).__name__}: {error}"[:200]) from error
    for event in events:
        if not event.is_comment:
            yield event.start / 1000, event.end / 1000, _TAG.sub("", event.plaintext)


def _from_json(text: str) -> Iterator[tuple[Any, Any, str]]:
    value = parse_json(text, max_bytes=_MAX_BYTES)
    rows = value.get("segments") if isinstance(value, dict) else value
    if not isinstance(rows, list):
        raise UntrustedError("neither a list of lines nor an object with segments")
    for row in rows:
        if not isinstance(row, dict):
            raise UntrustedError(f"a line is an object, not {type(row).__name__}")
        times = row.get("timestamp")
        start, end = times if isinstance(times, list) and len(times) == 2 else (row.get("start"), row.get("end"))
        words = row.get("line") if "line" in row else row.get("text")
        yield _seconds(start), _seconds(end), words if isinstance(words, str) else ""


def _seconds(value: Any) -> float | None:
    """Seconds as a number, or as a clock such as 00:01:02.5; None for anything else."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, str) and (clock := _CLOCK.fullmatch(value)):
        hours, minutes, seconds = clock.groups()
        return int(hours or 0) * 3600 + int(minutes) * 60 + float(seconds.replace(",", "."))
    return None


def _ordered(
    path: Path, raw: Iterable[tuple[Any, Any, str]], problems: list[str], duration: float | None, offset: float
) -> Transcript:
    lines: list[Line] = []
    untimed = reversed_ = cut = late = 0
    shown: set[str] = set()
    for start, end, words in raw:
        if start is None or not 0 <= start <= _MAX_SECONDS:
            untimed += 1
            continue
        end = start if end is None else end
        if not start <= end <= 2 * _MAX_SECONDS:
            reversed_ += 1
            continue
        said = [" ".join(part.split()) for part in mend_text(words).splitlines()]
        fresh = [part for part in said if part and part not in shown]
        shown = set(said)
        if not fresh or end < offset:
            continue
        text = " ".join(fresh)
        cut += len(text) > LINE_CHARS
        late += duration is not None and start - offset > duration + _LATE
        lines.append(Line(max(0.0, start - offset), end - offset, text[:LINE_CHARS].rstrip()))
    for count, what in (
        (untimed, "have no time"),
        (reversed_, "end before they start"),
        (cut, f"are longer than {LINE_CHARS} characters, and were cut"),
        (late, "come more than a minute after the video's end: they may be another video's"),
    ):
        if count:
            problems.append(f"{count} of its lines {what}")
    if not lines:
        raise _bad(path, "have no line" if not problems else f"have no usable line ({'; '.join(problems)})")
    return Transcript(tuple(sorted(lines, key=lambda line: (line.start, line.end))), tuple(problems))


def write_index(transcript: Transcript, target: Path, made_of: str) -> int:
    """Write the index of a transcript; returns its lines. `made_of` is the digest by which it is known to be stale."""
    with atomic_path(target) as partial, closing(sqlite3.connect(partial)) as base:
        base.executescript(
            """
            PRAGMA journal_mode = OFF;
            CREATE TABLE about (format INTEGER, made_of TEXT);
            CREATE TABLE lines (id INTEGER PRIMARY KEY, start REAL, end REAL, text TEXT);
            CREATE INDEX by_time ON lines (start);
            CREATE VIRTUAL TABLE words USING fts5 (
                text, content = 'lines', content_rowid = 'id', tokenize = 'porter unicode61 remove_diacritics 2'
            );
            """
        )
        base.execute("INSERT INTO about VALUES (?, ?)", (_FORMAT, made_of))
        rows = ((line.start, line.end, line.text) for line in transcript.lines)
        base.executemany("INSERT INTO lines (start, end, text) VALUES (?, ?, ?)", rows)
        base.execute("INSERT INTO words (words) VALUES ('rebuild')")
        base.commit()
    return len(transcript.lines)


def words_of(query: str) -> list[str]:
    """The words of a query, in lower case, each once; the first 32."""
    return list(dict.fromkeys(word.lower() for word in _WORD.findall(query)))[:32]


class Subtitles:
    """The indexed lines of one video. Reads are safe from several threads: each opens the file for itself.

    Raises:
        ItemError: `damaged_subtitles`, the index cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            ((form, self.made_of),) = self._rows("SELECT format, made_of FROM about")
        except ValueError:
            form = None
        if form != _FORMAT:
            raise self._damaged("it is of another format")

    @property
    def end(self) -> float:
        """When the last line ends (s)."""
        ((end,),) = self._rows("SELECT max(end) FROM lines")
        return float(end or 0.0)

    def search(self, query: str, start: float, end: float, count: int) -> list[Line]:
        """The lines that fit a query best among those that are said within a window, in order of time.

        Ranked by BM25 over the words of the query, whole words and their stems. Where no line has any of them, lines
        that hold the query as it is written are found: for scripts without spaces between words.

        Args:
            query: any text; nothing in it is a command.
            start: of the window (s); a line that is being said then counts.
            end: of the window (s).
            count: lines at most.
        """
        words = words_of(query)
        window = "lines.end >= ? AND lines.start <= ?"
        found: Sequence[tuple[Any, ...]] = ()
        if words:
            asked = " OR ".join(map(_quoted, words))
            found = self._rows(
                "SELECT lines.start, lines.end, lines.text FROM words JOIN lines ON lines.id = words.rowid "
                f"WHERE words MATCH ? AND {window} ORDER BY words.rank, lines.id LIMIT ?",
                (asked, start, end, count),
            )
        if not found:
            found = self._rows(
                f"SELECT start, end, text FROM lines WHERE instr(lower(text), ?) > 0 AND {window} LIMIT ?",
                (" ".join(query.lower().split()), start, end, count),
            )
        return sorted((Line(*row) for row in found), key=lambda line: (line.start, line.end))

    def count(self, words: Sequence[str]) -> tuple[int, list[int]]:
        """How many lines there are, and how many hold each of some words (`words_of`) or a word of its stem."""
        each = "".join(", (SELECT count(*) FROM words WHERE words MATCH ?)" for _ in words)
        ((total, *holding),) = self._rows(f"SELECT (SELECT count(*) FROM lines){each}", tuple(map(_quoted, words)))
        return total, holding

    def holding(self, words: Sequence[str]) -> list[tuple[Line, set[int]]]:
        """The lines that hold any of some words, in order of time, each with the places of those that it holds."""
        if not words:
            return []
        each = " UNION ALL ".join(
            f"SELECT {place} AS place, rowid AS id FROM words WHERE words MATCH ?" for place in range(len(words))
        )
        rows = self._rows(
            "SELECT lines.start, lines.end, lines.text, group_concat(place) FROM lines "
            f"JOIN ({each}) AS held ON held.id = lines.id GROUP BY lines.id ORDER BY lines.start, lines.id",
            tuple(map(_quoted, words)),
        )
        return [(Line(*line), set(map(int, places.split(",")))) for *line, places in rows]

    def quoting(self, query: str) -> list[Line]:
        """The lines that hold a text as it is written, but for case and spaces, in order of time; 50 at most."""
        asked = " ".join(query.lower().split())
        if not asked:
            return []
        rows = self._rows(
            "SELECT start, end, text FROM lines WHERE instr(lower(text), ?) > 0 ORDER BY start, id LIMIT 50", (asked,)
        )
        return [Line(*row) for row in rows]

    def within(self, start: float, end: float, count: int, skip: int = 0) -> list[Line]:
        """The lines that are said within a window (s), in order of time: `count` at most, after the first `skip`."""
        rows = self._rows(
            "SELECT start, end, text FROM lines WHERE end >= ? AND start <= ? ORDER BY start, id LIMIT ? OFFSET ?",
            (start, end, count, skip),
        )
        return [Line(*row) for row in rows]

    def _rows(self, query: str, values: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        address = f"{self._path.absolute().as_uri()}?mode=ro&immutable=1"
        try:
            with closing(sqlite3.connect(address, uri=True)) as base:
                return base.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise self._damaged(str(error)) from error

    def _damaged(self, why: str) -> ItemError:
        return ItemError(
            f"the subtitle index {self._path} is damaged ({why}): run `timesearch subtitles` again",
            reason="damaged_subtitles",
        )


def _quoted(word: str) -> str:
    """A word as FTS5 takes it for nothing but a word."""
    return f'"{word}"'


def made_of(index: Path) -> str:
    """The digest of what an index was made of; empty where there is none that can be read."""
    with suppress(ItemError):
        return Subtitles(index).made_of if index.is_file() else ""
    return ""


def index_path(folder: Path, name: str) -> Path:
    """Where the index of the video `name` is in a folder of indexes.

    Raises:
        ItemError: `unsafe_path`.
    """
    return inside(folder, f"{name}.subtitles")


@dataclass(frozen=True)
class Source:
    """Where the words of a video come from: a file (None: a stream inside the video), and how late the video begins."""

    file: Path | None = None
    offset: float = 0.0


def index_subtitles(
    videos: Mapping[str, Path],
    out: Path,
    sources: Mapping[str, Source] = MappingProxyType({}),
    say: Callable[[str], None] = lambda _: None,
    set_aside: Sequence[Failure] = (),
    speech: Speech | None = None,
) -> BatchResult:
    """Make or renew the subtitle indexes of many videos; a video without subtitles gets none, which is no failure.

    Args:
        videos: name of each video (its index is `<out>/<name>.subtitles`) and its file.
        out: folder of the indexes; what failed is listed in its `failures.jsonl`.
        sources: where the words of a video come from, if not from beside or inside it.
        say: told what was wrong with lines of a file that is used.
        set_aside: rows of sample files that name no video; they are listed with what fails.
        speech: writes down what is said where there are no subtitles; None does without.
    """
    with exclusive(out):
        work = functools.partial(_index_one, videos=videos, out=out, sources=sources, say=say, speech=speech)
        return run_batch(
            "subtitles",
            list(videos),
            work,
            failures=out / "failures.jsonl",
            workers=1,
            unit="lines",
            set_aside=set_aside,
        )


def _index_one(
    name: str,
    *,
    videos: Mapping[str, Path],
    out: Path,
    sources: Mapping[str, Source],
    say: Callable[[str], None],
    speech: Speech | None,
) -> Made | None:
    return make_index(videos[name], index_path(out, name), sources.get(name), say, speech)


def is_stale(video: Path, target: Path, speech: Speech | None = None) -> bool:
    """Whether `make_index` has something to do: words came, changed or went since, or are to be heard.

    Raises:
        ItemError: the video cannot be read.
    """
    file = find_subtitles(video)
    digest = _digest(video, file, 0.0)
    if target.is_file():
        return made_of(target) not in (digest, _heard(digest, file, speech))
    if file is not None or has_embedded(video):
        return True
    return speech is not None and not speech.has_heard(video, _transcript_path(target))


def _heard(digest: str, file: Path | None, speech: Speech | None) -> str | None:
    """The digest of an index of what `speech` hears in a video; None where it is not asked."""
    return None if file or speech is None else json_digest([digest, speech.digest])


def _transcript_path(index: Path) -> Path:
    return index.with_suffix(".speech.json")


def _digest(video: Path, file: Path | None, offset: float) -> str:
    words = file or video
    return json_digest([remembered(words) if words.is_file() else "", bool(file), offset])


def make_index(
    video: Path,
    target: Path,
    source: Source | None = None,
    say: Callable[[str], None] = lambda _: None,
    speech: Speech | None = None,
    stop: Stop = NEVER,
) -> Made | None:
    """Make or renew the index of what is said in a video; None where it is up to date, or the video has no subtitles.

    Where it has none, `speech` writes down what is said, into a file beside the index.

    Raises:
        ItemError: `bad_subtitles`, or the video cannot be read.
        StoppedError: `stop` asked to give up what `speech` does.
    """
    source = source or Source()
    check_readable(video)
    file = source.file or find_subtitles(video)
    digest = _digest(video, file, source.offset)
    heard = _heard(digest, file, speech)
    if target.is_file() and made_of(target) in (digest, heard):
        return None
    info = probe(video)
    if file:
        transcript: Transcript | None = read_subtitles(file, info.duration, source.offset)
    else:
        transcript = read_embedded(video, info.duration, info.start)
    if transcript is None and speech is not None and heard is not None:
        written = speech.write_down(video, _transcript_path(target), info.start, say, stop)
        transcript, digest = (read_subtitles(written), heard) if written else (None, digest)
    if transcript is None:
        target.unlink(missing_ok=True)
        return None
    for problem in transcript.problems:
        say(f"{file or video}: {problem}")
    stale = "of other subtitles" if target.is_file() else ""
    return Made(write_index(transcript, target, digest), stale)


def run(settings: Settings, say: Callable[[str], None] = lambda _: None) -> BatchResult:
    """Stage `subtitles`: the words of the videos of all samples, to `cache/subtitles`.

    A row of LongVideoBench names its file (`subtitle_path`, below the folder of videos or in ``subtitles/`` there) and
    when its video begins (`starting_timestamp_for_subtitles`). Any other video's is beside it, or in a folder
    ``subtitle`` or ``subtitles`` below that of videos, as Video-MME publishes them, or inside it.
    """
    broken: list[Failure] = []
    paths = settings.paths
    videos: dict[str, Path] = {}
    sources: dict[str, Source] = {}
    for sample in read_all_samples((paths.train_samples, paths.test_samples), broken.append):
        name = os.path.normpath(sample.video)
        videos[name] = paths.videos / name
        told, begins = sample.meta.get("subtitle_path"), sample.meta.get("starting_timestamp_for_subtitles")
        if isinstance(told, str) and told:
            offset = float(begins) if isinstance(begins, int | float) and math.isfinite(begins) else 0.0
            places = [inside(paths.videos, told), inside(paths.videos, f"subtitles/{told}")]
            sources[name] = Source(next((place for place in places if place.is_file()), places[0]), offset)
        elif find_subtitles(videos[name]) is None:
            apart = (find_subtitles(inside(paths.videos, f"{folder}/{name}")) for folder in ("subtitle", "subtitles"))
            if (file := next((file for file in apart if file is not None), None)) is not None:
                sources[name] = Source(file)
    return index_subtitles(videos, paths.subtitles, sources, say, broken, speech_of(settings.subtitles.speech))


def speech_of(model: str | None) -> Speech | None:
    """The model of this name or folder that writes down speech; None where none is named.

    Raises:
        RequestError: the folder holds no such model.
    """
    from timesearch.video.speech import Speech

    return Speech(model) if model else None
