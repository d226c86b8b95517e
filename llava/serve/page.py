"""Parts of the demo's page as HTML. Every text of users, models and files is escaped; pictures are data URLs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from llava.serve.conversations import Said, Shown
from llava.serve.examples import Example

BANNER = (
    '<div class="banner" role="note"><strong>Not for clinical use.</strong> Research software: nothing it answers may '
    "be relied on in the care of a patient. Pictures and questions stay in this computer's memory and are forgotten "
    "when the page is closed.</div>"
)
PICK = """
<label class="pick" tabindex="0">
  <input type="file" multiple accept="image/*,.dcm,.dicom,application/dicom" aria-label="Add pictures">
  <span class="pick-words"><strong>Add pictures</strong> or drop them here<br>
  <small>PNG, JPEG, DICOM and others; MOST_PICTURES at most, MOST_MEGABYTES MB together</small></span>
</label>
"""
PICK_SCRIPT = """
const input = element.querySelector('input'), label = element.querySelector('label');
const words = element.querySelector('.pick-words'), usual = words.innerHTML;
const base64 = file => new Promise((done, failed) => {
  const reader = new FileReader();
  reader.onload = () => done(reader.result.slice(reader.result.indexOf(',') + 1));
  reader.onerror = () => failed(reader.error);
  reader.readAsDataURL(file);
});
const hand = async files => {
  const some = Array.from(files).slice(0, 2 * MOST_PICTURES);
  if (!some.length) return;
  words.textContent = 'Reading …';
  let left = MOST_MEGABYTES * 2 ** 20;
  const read = [];
  for (const file of some) {
    left -= file.size;  // what is too large is not sent; its name alone gets the server's refusal
    read.push({name: file.name, data: left < 0 ? null : await base64(file), size: file.size});
  }
  words.innerHTML = usual;
  input.value = '';
  trigger('upload', {files: read});
};
input.addEventListener('change', () => hand(input.files));
label.addEventListener('keydown', event => {
  if (event.key === 'Enter' || event.key === ' ') { event.preventDefault(); input.click(); }
});
for (const name of ['dragover', 'dragleave', 'drop']) {
  label.addEventListener(name, event => {
    event.preventDefault();
    label.classList.toggle('over', name === 'dragover');
    if (name === 'drop') hand(event.dataTransfer.files);
  });
}
"""
CHOOSE_SCRIPT = """
element.addEventListener('click', event => {
  const chosen = event.target.closest('button[data-number]');
  if (chosen) trigger('click', {number: Number(chosen.dataset.number)});
});
"""
STYLE = """
.gradio-container { max-width: 1280px !important; margin: 0 auto !important; --quiet: #566070; --dark: #18181b;
  --soft: #dbeafe; }
.dark .gradio-container, .gradio-container.dark { --quiet: #b3bac6; --soft: #1e3a5f; }
.html-container { padding: 0 !important; }
.title h1 { font-size: 1.5rem; font-weight: 650; margin: 0.4rem 0 0; line-height: 1.25; }
.title p { margin: 0.2rem 0 0; color: var(--quiet); overflow-wrap: anywhere; }
.banner { background: #fff4d6; color: #4a3200; border-left: 5px solid #c07f00; border-radius: 6px;
  padding: 0.6rem 0.9rem; line-height: 1.45; }
.banner strong { color: inherit; }
.dark .banner { background: #3a2c08; color: #ffe9b0; }
.pick { display: block; position: relative; cursor: pointer; text-align: center; padding: 1rem; line-height: 1.5;
  border: 2px dashed var(--border-color-primary); border-radius: 10px; color: var(--body-text-color); }
.pick:hover, .pick.over, .pick:focus-visible { border-color: var(--color-accent); outline: none; }
.pick input { position: absolute; opacity: 0; pointer-events: none; width: 1px; height: 1px; }
.pick small, .panel .quiet { color: var(--quiet); }
.prose .shown { display: flex; flex-wrap: wrap; gap: 0.7rem; margin: 0; padding: 0; list-style: none; }
.prose .shown li { width: 168px; margin: 0; padding: 0; }
.prose .shown img { width: 168px; height: 168px; border-radius: 8px; object-fit: contain; margin: 0;
  background: var(--dark); }
.shown span { display: block; font-size: 0.8rem; color: var(--quiet); overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; }
.talk { display: flex; flex-direction: column; gap: 0.55rem; min-height: 5rem; }
.prose .talk p { margin: 0; padding: 0.55rem 0.85rem; border-radius: 12px; max-width: 85%; white-space: pre-wrap;
  overflow-wrap: anywhere; line-height: 1.45; color: var(--body-text-color); }
.prose .talk .question { align-self: flex-end; background: var(--soft); border-bottom-right-radius: 3px; }
.prose .talk .answer { align-self: flex-start; background: var(--background-fill-secondary);
  border: 1px solid var(--border-color-primary); border-bottom-left-radius: 3px; }
.prose .talk .base { border-style: dashed; border-color: var(--quiet); }
.talk .who { display: block; font-size: 0.78rem; color: var(--quiet); }
.prose .talk .empty { align-self: center; text-align: center; color: var(--quiet); margin: auto; }
.panel { border: 1px solid var(--border-color-primary); border-radius: 10px; padding: 0.9rem 1.1rem; }
.prose .panel h2 { font-size: 1.05rem; font-weight: 650; margin: 0 0 0.4rem; }
.prose .panel h3 { font-size: 0.9rem; font-weight: 650; margin: 0.9rem 0 0.2rem; }
.prose .panel p { margin: 0.35rem 0; line-height: 1.45; overflow-wrap: anywhere; }
.prose .panel table { width: 100%; border-collapse: collapse; margin: 0; border: 0; table-layout: fixed; }
.prose .panel tr { border: 0; }
.prose .panel th, .prose .panel td { border: 0; padding: 0.22rem 0.4rem 0.22rem 0; font-weight: 400; text-align: left;
  font-size: 0.92rem; background: none; color: var(--body-text-color); overflow-wrap: anywhere; }
.prose .panel th { width: 37%; }
.prose .panel td.number { width: 23%; text-align: right; white-space: nowrap; padding-right: 0;
  font-variant-numeric: tabular-nums; }
.panel .bar i { display: block; height: 0.8rem; border-radius: 3px; background: var(--color-accent); min-width: 2px; }
.mark { display: inline-block; padding: 0.1rem 0.6rem; border-radius: 99px; font-weight: 600; background: var(--soft);
  color: var(--body-text-color); }
.prose .notice { margin: 0; line-height: 1.45; color: var(--quiet); overflow-wrap: anywhere; }
.mark.unknown, .prose .notice.wrong { background: #fde2e1; color: #7a1210; }
.prose .notice.wrong { border-radius: 6px; padding: 0.45rem 0.8rem; }
.dark .mark.unknown, .dark .prose .notice.wrong { background: #4d1413; color: #ffd9d7; }
.prose h2.of-examples { font-size: 1.05rem; font-weight: 650; margin: 0.6rem 0 0.5rem; }
.examples { display: grid; grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)); gap: 0.7rem; }
.examples button { display: flex; gap: 0.7rem; align-items: center; text-align: left; padding: 0.5rem; width: 100%;
  border: 1px solid var(--border-color-primary); border-radius: 10px; background: var(--background-fill-primary);
  color: var(--body-text-color); cursor: pointer; line-height: 1.35; font-weight: 400; font-size: 0.95rem;
  min-height: 5.2rem; margin: 0; }
.examples button:hover, .examples button:focus-visible { border-color: var(--color-accent); outline: none; }
.prose .examples img { width: 64px; height: 64px; border-radius: 6px; flex: none; margin: 0; object-fit: contain;
  background: var(--dark); }
.examples small { display: block; color: var(--quiet); }
button.lg { white-space: nowrap; padding-inline: 0.4rem; }
footer { display: none !important; }
"""


def title(name: str, tasks: Sequence[str]) -> str:
    """The page's head: the model, and what it has learned."""
    learned = f"It has learned: {escape(', '.join(tasks))}." if tasks else "A base model: it has no slots."
    return f'<div class="title"><h1>Ask about a medical picture</h1><p>{escape(name)}. {learned}</p></div>'


def pictures_part(pictures: Sequence[Shown]) -> str:
    """The pictures that were added, small, with their names."""
    items = [
        f'<li><img src="{shown.thumbnail}" alt="Picture {number}: {escape(shown.name)}">'
        f'<span title="{escape(shown.name)}">{number} · {escape(shown.name)}</span></li>'
        for number, shown in enumerate(pictures, start=1)
    ]
    return f'<ul class="shown">{"".join(items)}</ul>' if items else ""


def talk_part(said: Sequence[Said]) -> str:
    """Questions and answers so far."""
    if not said:
        words = "Nothing was asked yet. Add a picture and ask about it, or take an example."
        return f'<div class="talk" aria-live="polite"><p class="empty">{words}</p></div>'
    return f'<div class="talk" aria-live="polite">{"".join(map(_turn, said))}</div>'


def _turn(said: Said) -> str:
    fresh = f'<span class="who">about {said.pictures} picture{"s"[: said.pictures > 1]}</span>' if said.pictures else ""
    parts = [f'<p class="question">{fresh}{escape(said.question)}</p>']
    if said.answer is None:
        parts.append(f'<p class="answer">{escape(said.text)} …</p>')
    else:
        ends = {"length": " … (no more tokens were allowed)", "stopped": " … (stopped)"}
        words = (said.text or "(an empty answer)") + ends.get(said.answer.finish, "")
        known = "" if said.reference is None else f'<span class="who">reference: {escape(said.reference)}</span>'
        parts.append(f'<p class="answer">{escape(words)}{known}</p>')
    if said.base is not None:
        words = said.base.text or "(an empty answer)"
        parts.append(f'<p class="answer base"><span class="who">the base alone</span>{escape(words)}</p>')
    return "".join(parts)


def route_part(said: Sequence[Said], tasks: Mapping[int, str]) -> str:
    """How the last question found its slots; ``tasks``: the task of each slot."""
    answered = [one for one in said if one.answer is not None]
    if not answered:
        return _panel('<p class="quiet">With each answer: which task the question fits, and which slots answered.</p>')
    last = answered[-1]
    route = last.answer.route if last.answer is not None else None
    asked = f'<p class="quiet">“{escape(last.question)}”</p>'
    if route is None:
        return _panel(f'{asked}<p><span class="mark">base</span> The base model answered; no slots acted.</p>')
    return _panel(asked + _verdict(route) + _posterior(route) + _slots(route, tasks))


def _panel(inside: str) -> str:
    return f'<section class="panel" aria-label="Route"><h2>Route</h2>{inside}</section>'


def _verdict(route: Mapping[str, Any]) -> str:
    novelty = route.get("novelty")
    told = "" if novelty is None else f" Novelty {novelty:.2f}; above 1 a question counts as unknown."
    if route.get("unknown"):
        words = "It fits no task that was learned, so the base model answered."
        return f'<p><span class="mark unknown">unknown</span> {words}{told}</p>'
    if route.get("task_given"):
        return f'<p><span class="mark">{escape(str(route.get("task", "")))}</span> The task was given.</p>'
    return f'<p><span class="mark">{escape(str(route.get("task", "slots")))}</span>{told}</p>'


def _posterior(route: Mapping[str, Any]) -> str:
    posterior = route.get("task_posterior") or {}
    ordered = sorted(posterior.items(), key=lambda entry: -entry[1])
    rows = [_bar(escape(task), share, f"{100 * share:.1f} %") for task, share in ordered]
    return f"<h3>Task posterior</h3><table>{''.join(rows)}</table>" if rows else ""


def _slots(route: Mapping[str, Any], tasks: Mapping[int, str]) -> str:
    pairs = sorted(zip(route.get("slots", ()), route.get("weights", ())), key=lambda pair: -pair[1])
    rows = [
        _bar(f"slot {slot}{' · ' + escape(tasks[slot]) if slot in tasks else ''}", weight, f"{weight:.3f}")
        for slot, weight in pairs
    ]
    return f"<h3>Slots and weights</h3><table>{''.join(rows)}</table>" if rows else ""


def _bar(name: str, share: float, told: str) -> str:
    width = 100 * min(max(share, 0.0), 1.0)
    bar = f'<td class="bar" aria-hidden="true"><i style="width:{width:.1f}%"></i></td>'
    return f'<tr><th scope="row">{name}</th>{bar}<td class="number">{told}</td></tr>'


def notice(text: str, wrong: bool = False) -> str:
    """A line for the user; an error is also read out."""
    if not text:
        return ""
    return f'<p class="notice{" wrong" if wrong else ""}" role="{"alert" if wrong else "status"}">{escape(text)}</p>'


def examples_part(examples: Sequence[Example]) -> str:
    """Cards of the examples; each is a button."""
    cards = [
        f'<button type="button" data-number="{number}"><img src="{example.thumbnail}" alt="">'
        f"<span>{escape(example.question)}<small>{escape(example.domain or '')}</small></span></button>"
        for number, example in enumerate(examples)
    ]
    return f'<h2 class="of-examples">Examples from the test set</h2><div class="examples">{"".join(cards)}</div>'
