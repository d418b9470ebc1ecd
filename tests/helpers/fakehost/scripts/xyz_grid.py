"""The host's X/Y/Z plot, by the contract that an extension's axes live by.

Each cell is a shallow copy of the plot's own object, to which the axes are applied one after another; the
values of all axes are read, and confirmed, before the first cell; dear axes are the outer ones; what a cell
raises is shown and leaves it empty.
"""

import csv
import itertools
from copy import copy
from io import StringIO

import gradio as gr
from modules import errors, processing, scripts, shared


def format_with_label(p, opt, x):
    return f"{opt.label}: {round(x, 8) if isinstance(x, float) else x}"


class AxisOption:
    def __init__(
        self,
        label,
        type,
        apply,
        format_value=format_with_label,
        confirm=None,
        cost=0.0,
        choices=None,
        prepare=None,
    ):
        self.label, self.type, self.apply, self.format_value = label, type, apply, format_value
        self.confirm, self.cost, self.choices, self.prepare = confirm, cost, choices, prepare


def field(name):
    return lambda p, x, xs: setattr(p, name, x)


def replace_in_prompt(p, x, xs):
    if xs[0] not in p.prompt:
        raise RuntimeError(f"{xs[0]} is not in the prompt.")
    p.prompt = p.prompt.replace(xs[0], x)


axis_options = [
    AxisOption("Nothing", str, lambda p, x, xs: None, format_value=lambda p, opt, x: ""),
    AxisOption("Seed", int, field("seed")),
    AxisOption("Prompt S/R", str, replace_in_prompt),
    AxisOption("VAE", str, field("vae"), cost=0.7),
    AxisOption("Styles", str, lambda p, x, xs: p.styles.extend(x.split(","))),
]


def split(text):
    return [value.strip() for value in next(csv.reader(StringIO(text), skipinitialspace=True), [])]


def joined(values):
    out = StringIO()
    csv.writer(out).writerow(values)
    return out.getvalue().strip()


class Script(scripts.Script):
    def title(self):
        return "X/Y/Z plot"

    def ui(self, is_img2img):
        self.current_axis_options = [option for option in axis_options if type(option) is AxisOption]
        labels = [option.label for option in self.current_axis_options]
        controls = []
        csv_mode = gr.Checkbox(
            label="Use text inputs instead of dropdowns", value=False, elem_id=self.elem_id("csv_mode")
        )
        for axis in "xyz":
            first = labels[1] if axis == "x" else labels[0]
            kind = gr.Dropdown(
                label=f"{axis.upper()} type",
                choices=labels,
                value=first,
                type="index",
                elem_id=self.elem_id(f"{axis}_type"),
            )
            text = gr.Textbox(label=f"{axis.upper()} values", lines=1, elem_id=self.elem_id(f"{axis}_values"))
            chosen = gr.Dropdown(
                label=f"{axis.upper()} values", visible=False, multiselect=True, interactive=True
            )
            kind.change(fn=self.select_axis, inputs=[kind, text, chosen, csv_mode], outputs=[text, chosen])
            controls += [kind, text, chosen]
        return [*controls, csv_mode]

    def select_axis(self, kind, text, chosen, csv_mode):
        choices = self.current_axis_options[kind or 0].choices
        if choices is None:
            return gr.update(visible=True, value=text), gr.update(choices=None, visible=False, value=chosen)
        choices = choices()
        if text and not csv_mode:
            chosen, text = [value for value in split(text) if value in choices], ""
        return (
            gr.update(visible=csv_mode, value=text),
            gr.update(choices=choices, visible=not csv_mode, value=chosen),
        )

    def run(self, p, *args):
        *axes, csv_mode = args
        options, values = [], []
        for index in range(0, 9, 3):
            option = self.current_axis_options[axes[index] or 0]
            options.append(option)
            values.append(self.values(p, option, axes[index + 1], axes[index + 2], csv_mode))
        labels = [[o.format_value(p, o, x) for x in xs] for o, xs in zip(options, values)]
        order = sorted(range(3), key=lambda axis: (-options[axis].cost, -axis))
        cells = {}
        for place in itertools.product(*(range(len(values[axis])) for axis in order)):
            at = tuple(index for _, index in sorted(zip(order, place)))
            cells[at] = self.cell(p, options, values, at)
        result = processing.Processed(p, [], [])
        result.comments = "".join(f"{comment}\n" for comment in p.comments)
        result.cells = []
        for at in sorted(cells):
            done = cells[at]
            result.images.append(done.images[0] if done.images else None)
            result.infotexts.append(done.infotexts[0] if done.infotexts else "(empty)")
            result.cells.append(
                {
                    "labels": [labels[axis][index] for axis, index in enumerate(at)],
                    "picture": result.images[-1],
                    "infotext": result.infotexts[-1],
                }
            )
        return result

    def values(self, p, option, text, chosen, csv_mode):
        if option.label == "Nothing":
            return [0]
        if option.choices is not None and not csv_mode:
            found = chosen
        else:
            found = option.prepare(text) if option.prepare is not None else split(text)
        found = [option.type(value) for value in found]
        if option.confirm:
            option.confirm(p, found)
        return found

    def cell(self, p, options, values, at):
        if shared.state.interrupted:
            return processing.Processed(p, [])
        pc = copy(p)
        pc.styles = pc.styles[:]
        for option, xs, index in zip(options, values, at):
            option.apply(pc, xs[index], xs)
        try:
            done = processing.process_images(pc)
        except Exception as error:
            errors.display(error, "generating image for xyz plot")
            done = processing.Processed(p, [])
        if at == (0, 0, 0):
            pc.extra_generation_params = copy(pc.extra_generation_params)
            # Fails where a picture fails before it has its prompts and seeds.
            processing.create_infotext(pc, pc.all_prompts, pc.all_seeds)
        return done
