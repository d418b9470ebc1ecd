// Merge LoRAs: a free input below the last one that is connected; text results shown on their node.
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

app.registerExtension({
  name: "loramerge",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.name === "LoraMergeMerge") {
      const changed = nodeType.prototype.onConnectionsChange;
      nodeType.prototype.onConnectionsChange = function (...given) {
        changed?.apply(this, given);
        growInputs(this);
      };
    }
    if (nodeData.name === "LoraMergeReport" || nodeData.name === "LoraMergeSave") {
      const executed = nodeType.prototype.onExecuted;
      nodeType.prototype.onExecuted = function (output) {
        executed?.apply(this, [output]);
        if (output?.text) showText(this, output.text, output.images ? 540 : 320);
      };
    }
  },
});
