"""The demo's page in gradio: its boxes and buttons, each of which does what ``llava.serve.desk`` says.

Gradio's own upload is not used, since it writes files: pictures come as text with the event that hands them over, and
go back as data URLs. Nothing that users give is written to a disk. Annotations are evaluated here (no
``from __future__``): by them gradio knows which arguments of a function it must bring.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr

from llava.serve import page
from llava.serve.desk import Desk, View
from llava.serve.examples import Example
from llava.serve.service import Service

FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"]
MONO = ["ui-monospace", "Menlo", "Consolas", "monospace"]
"""Fonts of the reader's machine: none is loaded."""


def build(service: Service, examples: Sequence[Example] = ()) -> tuple[Any, dict[str, Any]]:
    """The page, and what it must be mounted with: its look."""
    desk = Desk(service, examples)
    limits = service.limits
    numbers = {"MOST_PICTURES": str(limits.pictures), "MOST_MEGABYTES": str(limits.picture_bytes >> 20)}
    start = desk.whole(desk.talks.of(""))
    with gr.Blocks(analytics_enabled=False, title="Ask about a medical picture") as blocks:
        gr.HTML(page.title(service.name, list(dict.fromkeys(service.slot_tasks.values()))))
        gr.HTML(page.BANNER)
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                picker = gr.HTML(_filled(page.PICK, numbers), js_on_load=_filled(page.PICK_SCRIPT, numbers))
                pictures = gr.HTML(start.pictures)
                talk = gr.HTML(start.talk)
                told = gr.HTML(page.notice(""))
                box = gr.Textbox(
                    label="Question",
                    placeholder="Is there a pleural effusion?",
                    lines=1,  # the enter key asks
                    max_lines=6,
                    html_attributes=gr.InputHTMLAttributes(autocorrect="off", spellcheck=False),
                )
                compare = gr.Checkbox(label="Also show the base's answer", visible=service.has_base)
                with gr.Row():
                    ask = gr.Button("Ask", variant="primary", min_width=80)
                    stop = gr.Button("Stop", interactive=False, min_width=80)
                    over = gr.Button("Start over", min_width=80)
            with gr.Column(scale=2, min_width=300):
                route = gr.HTML(start.route)
        cards = gr.HTML(page.examples_part(examples), js_on_load=page.CHOOSE_SCRIPT) if examples else None

        parts = [pictures, talk, route, told, box, ask, stop]

        def shown(view: View) -> list[Any]:
            """The components' values; what does not change is skipped."""
            values = [view.pictures, view.talk, view.route, view.notice, view.question]
            found: list[Any] = [gr.skip() if value is None else value for value in values]
            if view.busy is None:
                return [*found, gr.skip(), gr.skip()]
            return [*found, gr.Button(interactive=not view.busy), gr.Button(interactive=view.busy)]

        def on_ask(text: str, with_base: bool, request: gr.Request) -> Iterator[list[Any]]:
            for view in desk.ask(request.session_hash or "", str(text or ""), bool(with_base)):
                yield shown(view)

        def on_pictures(request: gr.Request, event: gr.EventData) -> list[Any]:
            return shown(desk.show(request.session_hash or "", _told(event, "files")))

        def on_example(request: gr.Request, event: gr.EventData) -> list[Any]:
            return shown(desk.example(request.session_hash or "", _told(event, "number")))

        def on_opened(request: gr.Request) -> Iterator[list[Any]]:
            """``/?example=2`` opens the page with the second example, answered by the model and by its base."""
            wanted = request.query_params.get("example", "")
            if not wanted.isdecimal():
                yield shown(View())
                return
            view = desk.example(request.session_hash or "", int(wanted[:9]) - 1)
            yield shown(view)
            if view.question is not None:  # there is such an example
                for later in desk.ask(request.session_hash or "", view.question, with_base=True):
                    yield shown(later)

        def on_over(request: gr.Request) -> list[Any]:
            return shown(desk.start_over(request.session_hash or ""))

        def on_stop(request: gr.Request) -> None:
            desk.stop(request.session_hash or "")

        def on_closed(request: gr.Request) -> None:
            desk.forget(request.session_hash or "")
            blocks.state_holder.session_data.pop(request.session_hash or "", None)  # the values of its components

        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        each = {**quiet, "outputs": parts, "concurrency_limit": 2 * limits.at_once}
        ask.click(on_ask, inputs=[box, compare], **each)
        box.submit(on_ask, inputs=[box, compare], **each)
        blocks.load(on_opened, **each)
        picker.upload(on_pictures, outputs=parts, **quiet)
        if cards is not None:
            cards.click(on_example, outputs=parts, **quiet)
        over.click(on_over, outputs=parts, queue=False, **quiet)
        stop.click(on_stop, queue=False, **quiet)
        blocks.unload(on_closed)
        desk.talks.forget("")
    blocks.queue(max_size=4 * limits.at_once, default_concurrency_limit=2, api_open=False)
    blocks.state_session_capacity = desk.talks.most
    theme = gr.themes.Default(primary_hue="blue", neutral_hue="slate", font=FONTS, font_mono=MONO)
    theme.set(
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        input_placeholder_color="*neutral_500",
    )
    return blocks, {"theme": theme, "css": page.STYLE}


def _told(event: gr.EventData, name: str) -> Any:
    """What a script of the page says with an event, or ``None``."""
    return event._data.get(name) if isinstance(event._data, dict) else None


def _filled(text: str, numbers: dict[str, str]) -> str:
    for name, value in numbers.items():
        text = text.replace(name, value)
    return text
