// Merge LoRAs and Bake LoRAs: a free input below the last one that is connected, and the widgets that its choices need; text
// results shown on their node.
import { app } from "../../scripts/app.js";
import { ComfyWidgets } from "../../scripts/widgets.js";

const START = "loras_";

function growInputs(node) {
  const slots = () => node.inputs.filter((input) => input.name.startsWith(START));
  const last = () => slots().at(-1);
  while (slots().length > 2 && !last().link && !slots().at(-2).link) {
    node.removeInput(node.inputs.indexOf(last()));
  }
  if (last()?.link) {
    const number = 1 + Math.max(...slots().map((input) => Number(input.name.slice(START.length))));
    node.addInput(START + number, "LORAMERGE_LORAS");
  }
}

function showText(node, lines, height) {
  let widget = node.widgets?.find((entry) => entry.name === "shown");
  if (!widget) {
    widget = ComfyWidgets.STRING(node, "shown", ["STRING", { multiline: true }], app).widget;
    widget.inputEl.readOnly = true;
    widget.serializeValue = () => "";
    node.setSize([Math.max(node.size[0], 460), Math.max(node.size[1], height)]);
  }
  widget.value = lines.join("\n");
  app.graph.setDirtyCanvas(true, false);
}

// Pages of 2025 leave the place of a hidden widget free, unless it has no height.
const NO_PLACE = () => [0, -4];

// What does not apply is hidden, and ignored by the node; its value stays for when it applies again.
function showWhatApplies(node) {
  const widgets = node.widgets ?? [];
  const value = (name) => widgets.find((widget) => widget.name === name)?.value;
  const linked = (name) => node.inputs?.some((input) => input.widget?.name === name && input.link != null);
  for (const [widget, shown] of conditions(node)) {
    const applies = Object.entries(shown).every(([name, values]) => linked(name) || values.includes(value(name)));
    widget.hidden = !applies;
    widget.options = { ...widget.options, hidden: !applies };
    if (!applies) widget.computeSize = NO_PLACE;
    else if (widget.computeSize === NO_PLACE) delete widget.computeSize;
  }
  node.setSize([node.size[0], node.computeSize()[1]]);
  app.graph?.setDirtyCanvas(true, true);
}

function conditions(node) {
  const inputs = node.constructor.nodeData?.input ?? {};
  const options = { ...inputs.required, ...inputs.optional };
  return (node.widgets ?? [])
    .map((widget) => [widget, options[widget.name]?.[1]?.shown_for])
    .filter(([, shown]) => shown);
}

function followChoices(node) {
  const names = new Set(conditions(node).flatMap(([, shown]) => Object.keys(shown)));
  for (const widget of (node.widgets ?? []).filter((one) => names.has(one.name))) {
    const chosen = widget.callback;
    widget.callback = function (...given) {
      chosen?.apply(this, given);
      showWhatApplies(node);
    };
  }
  showWhatApplies(node);
}

app.registerExtension({
  name: "loramerge",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (["LoraMergeMerge", "LoraMergeBake"].includes(nodeData.name)) {
      const changed = nodeType.prototype.onConnectionsChange;
      nodeType.prototype.onConnectionsChange = function (...given) {
        changed?.apply(this, given);
        growInputs(this);
      };
      for (const [when, then] of [["onNodeCreated", followChoices], ["onConfigure", showWhatApplies]]) {
        const before = nodeType.prototype[when];
        nodeType.prototype[when] = function (...given) {
          before?.apply(this, given);
          then(this);
        };
      }
    }
    if (["LoraMergeReport", "LoraMergeSave", "LoraMergeBake"].includes(nodeData.name)) {
      const executed = nodeType.prototype.onExecuted;
      nodeType.prototype.onExecuted = function (output) {
        executed?.apply(this, [output]);
        if (output?.text) showText(this, output.text, output.images ? 540 : 320);
      };
    }
  },
});
