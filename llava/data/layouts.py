"""Rows of other programs as what they are, and names that are known: nothing that a row says is passed over.

Beside question rows and LLaVA's instruct rows these layouts are read: LLaMA-Factory's (``conversations`` or Alpaca's
``instruction``, ``input``, ``output``, with ``images``), ms-swift's (``messages``, or ``query`` and ``response``, with
``images``) and Hugging Face's (``messages`` whose contents are lists of parts; ``question`` and ``answer``; pictures as
``{"path", "bytes"}``). Their rows need no id: the place in the file is one.

Fields of no meaning here are kept. A field that names the picture under another name is read, one that is a slip of
the pen for a known field is refused with that field's name, and so is what no row can carry here (videos, tools).
"""

from __future__ import annotations

from typing import Any

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.data.jsonl import text_of
from llava.outside import kind_of
from llava.schema import refuse_slips
from llava.utils import UserError

PICTURE_FIELDS = tuple(
    "images image_path image_paths image_file image_files image_name image_names img img_name img_path img_file "
    "file_name filename picture pictures".split()
)
"""Names under which other programs' rows have their picture, or a list of them."""
COMMON_FIELDS = ("image", "domain", "answer_type", "question_type", "split")
QUESTION_FIELDS = ("question_id", "pair_id", "text", "gpt4_answer", *COMMON_FIELDS)
INSTRUCT_FIELDS = ("id", "conversations", "system", *COMMON_FIELDS)
CONVERSATION_KEYS = ("conversations", "conversatons")  # the second is a slip in LLaVA-Med's published files
NOT_READ = ("videos", "video", "audios", "audio", "tools", "rejected_response", "chosen", "rejected")
"""Fields of other programs' rows that would change what is learned, and can't be carried out here."""
OWN_FIELDS = frozenset((*QUESTION_FIELDS, *INSTRUCT_FIELDS, *CONVERSATION_KEYS, *PICTURE_FIELDS, *NOT_READ))
MISSING = frozenset(("nan", "null", "<na>"))
"""What tables and programs write where a value is missing; in lower case."""

_ROLES = {"user": "human", "assistant": "gpt", "model": "gpt"}
_ALIKE = 0.8
"""Of 1: how much of a field's name must be a known one's to be taken for a slip of it."""


def in_our_layout(value: dict[str, Any], where: str) -> tuple[dict[str, Any], bool]:
    """A row with the fields of a question row or an instruct row, and whether it came in another program's layout.

    Args:
        value: the row as read; it is left as it is.
        where: names the row in messages.

    Raises:
        UserError: a misspelt field, two different pictures under two names, or what can't be read here.
    """
    for name in NOT_READ:
        if value.get(name):
            raise UserError(f"{where}: field {name!r}: rows of pictures and texts alone are read here (leave it out)")
    own = "text" in value or any(name in value for name in CONVERSATION_KEYS)
    named = [] if own else sorted((name for name in _READERS if name in value), key=lambda name: value[name] is None)
    layout = named[0] if named else None
    row = dict(value) if layout is None else {**value, **_READERS[layout](value, where)}
    if any(name in row for name in CONVERSATION_KEYS):
        _refuse_slips(value, COMMON_FIELDS if layout else INSTRUCT_FIELDS, where)
        _place_system(row, where)
    elif "text" in row:
        _refuse_slips(value, ("answer", *COMMON_FIELDS) if layout else QUESTION_FIELDS, where)
        if row.get("gpt4_answer") is None and row.get("answer") is not None:
            row["gpt4_answer"] = row["answer"]
    else:
        _refuse_slips(value, (*QUESTION_FIELDS, *INSTRUCT_FIELDS), where)
    row["image"] = _pictures(row, where)
    return row, layout is not None or "images" in value


def other_field(value: Any) -> str | None:
    """The field that a row has its picture in where it is not ``image``."""
    if not isinstance(value, dict) or value.get("image") not in (None, []):
        return None
    return next((name for name in PICTURE_FIELDS if value.get(name) not in (None, [])), None)


def _refuse_slips(row: dict[str, Any], known: tuple[str, ...], where: str) -> None:
    """Refuse a field whose name is nearly that of a known one which the row lacks."""
    refuse_slips(row, known, where, passed=OWN_FIELDS, alike=_ALIKE)


def is_missing(value: Any) -> bool:
    """Whether a text stands for a missing value; ``None`` and ``NA`` are words that answers have."""
    return isinstance(value, str) and value.strip().lower() in MISSING


# -- pictures ----------------------------------------------------------------------------------------------------------


def _pictures(row: dict[str, Any], where: str) -> Any:
    """The value of ``image``: a name, a list of names, or None; whichever field the row has them in."""
    named = {name: row.get(name) for name in ("image", *PICTURE_FIELDS) if row.get(name) not in (None, [])}
    if not named:
        _refuse_other_pictures(row, where)
        return row.get("image")
    found = {name: _names(value, f"{where}: field {name!r}") for name, value in named.items()}
    first = next(iter(found))
    others = [name for name in found if found[name] != found[first] and (first != "image" or name == "images")]
    if others:
        raise UserError(f"{where}: fields {first!r} and {others[0]!r} name different pictures (keep one of them)")
    return found[first]


def _refuse_other_pictures(row: dict[str, Any], where: str) -> None:
    """Refuse a row without a picture that speaks of one under a name which is not known."""
    for name, value in row.items():
        speaks = any(word in str(name).lower() for word in ("image", "img", "picture"))
        if speaks and name not in OWN_FIELDS and isinstance(value, str | list | dict) and value:
            raise UserError(f"{where}: field {name!r} seems to name a picture (call it 'image', with a file's name)")


def _names(value: Any, where: str) -> Any:
    if isinstance(value, list):
        return [_name(entry, where) for entry in value]
    return _name(value, where)


def _name(entry: Any, where: str) -> Any:
    """The file name of a picture as Hugging Face's ``datasets`` writes it; anything else as it is."""
    if not isinstance(entry, dict) or not {"path", "bytes"} & set(entry):
        return entry
    if entry.get("path"):
        return text_of(entry["path"], f"{where}, 'path'")
    raise UserError(f"{where}: the picture itself stands in the row (save it as a file and name the file)")


# -- layouts -----------------------------------------------------------------------------------------------------------


def _messages(row: dict[str, Any], where: str) -> dict[str, Any]:
    """Turns with ``role`` and ``content``; pictures among the contents' parts are taken out in their order."""
    where = f"{where}: field 'messages'"
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: expected a list of {{role, content}}, found {kind_of(messages)}")
    turns, pictures = [], []
    for number, message in enumerate(messages, start=1):
        place = f"{where}, turn {number}"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UserError(f"{place}: expected an object with 'role' and 'content', found {kind_of(message)}")
        text, shown = _content(message.get("content"), place)
        turns.append({"from": _ROLES.get(message["role"], message["role"]), "value": text})
        pictures += shown
    return {"conversations": turns, **({"image": pictures} if pictures else {})}


def _content(content: Any, where: str) -> tuple[str, list[Any]]:
    """A message's text with ``<image>`` where a picture stands, and the pictures that it names itself."""
    if not isinstance(content, list):
        return text_of(content, f"{where}, 'content'"), []
    text, pictures = [], []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            text.append(text_of(part.get("text"), f"{where}, 'text'"))
        elif kind in ("image", "image_url"):
            text.append(DEFAULT_IMAGE_TOKEN)
            pictures += [part[name] for name in ("image", "path", "url", "image_url") if part.get(name) is not None]
        else:
            raise UserError(f"{where}: expected parts of the type 'text' or 'image', found {kind_of(part)}")
    return "\n".join(text), [_name(picture, where) for picture in pictures]


def _alpaca(row: dict[str, Any], where: str) -> dict[str, Any]:
    """LLaMA-Factory's ``instruction``, ``input``, ``output``, ``system``, ``history``."""
    asked = [text_of(row[name], f"{where}: field {name!r}") for name in ("instruction", "input") if row.get(name)]
    return _exchange(row, "\n".join(asked), row.get("output"), where)


def _query(row: dict[str, Any], where: str) -> dict[str, Any]:
    """ms-swift's ``query``, ``response``, ``system``, ``history``."""
    return _exchange(row, text_of(row["query"], f"{where}: field 'query'"), row.get("response"), where)


def _exchange(row: dict[str, Any], asked: str, answer: Any, where: str) -> dict[str, Any]:
    """Earlier questions with their answers, then the last ones, as turns."""
    turns: list[dict[str, Any]] = []
    history = row.get("history") or []
    for pair in history if isinstance(history, list) else [history]:
        if not isinstance(pair, list) or len(pair) != 2:
            raise UserError(f"{where}: field 'history': expected pairs of question and answer, found {kind_of(pair)}")
        turns += [{"from": "human", "value": pair[0]}, {"from": "gpt", "value": pair[1]}]
    turns.append({"from": "human", "value": asked})
    if answer is not None:
        turns.append({"from": "gpt", "value": answer})
    return {"conversations": turns}


def _question(row: dict[str, Any], where: str) -> dict[str, Any]:
    """``question`` and ``answer``, as data sets on the Hub have them."""
    number = next((row[name] for name in ("question_id", "qid", "id") if row.get(name) is not None), None)
    return {
        "text": text_of(row["question"], f"{where}: field 'question'"),
        "gpt4_answer": row["gpt4_answer"] if row.get("gpt4_answer") is not None else row.get("answer"),
        **({} if number is None else {"question_id": number}),
    }


_READERS = {"messages": _messages, "instruction": _alpaca, "query": _query, "question": _question}


def _place_system(row: dict[str, Any], where: str) -> None:
    """A field ``system`` beside the turns is their first one."""
    key = next(name for name in CONVERSATION_KEYS if name in row)
    turns, system = row[key], row.get("system")
    if system is None or not isinstance(turns, list) or not turns:
        return
    text = text_of(system, f"{where}: field 'system'")
    has_one = isinstance(turns[0], dict) and turns[0].get("from") == "system"
    if text.strip() and not has_one:
        row[key] = [{"from": "system", "value": text}, *turns]
