// Merge LoRAs and Bake LoRAs: a free input below the last one that is connected, and the parameters of its mode alone; text
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

// The parameters of other modes are hidden; their values stay for when the mode comes back.
function showParameters(node) {
  const mode = node.widgets?.find((widget) => widget.name === "mode");
  const options = node.constructor.nodeData?.input?.optional ?? {};
  for (const widget of node.widgets ?? []) {
    const modes = options[widget.name]?.[1]?.modes;
    if (!modes) continue;
    widget.hidden = !modes.includes(mode.value);
    widget.options = { ...widget.options, hidden: widget.hidden };
  }
  node.setSize([node.size[0], node.computeSize()[1]]);
  app.graph?.setDirtyCanvas(true, true);
}

function followMode(node) {
  const mode = node.widgets?.find((widget) => widget.name === "mode");
  if (!mode) return;
  const chosen = mode.callback;
  mode.callback = function (...given) {
    chosen?.apply(this, given);
    showParameters(node);
  };
  showParameters(node);
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
      for (const [when, then] of [["onNodeCreated", followMode], ["onConfigure", showParameters]]) {
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
