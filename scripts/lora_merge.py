"""The LoRA Merge tab and the axes of the X/Y/Z plot in a WebUI.

The host executes this file outside ``sys.modules``, and keeps the extension's folder on ``sys.path`` only
while it does so. Therefore nothing stands here but the import, the registration, and the script that the host
looks for in this module.
"""

from lib_loramerge.webui import extension

extension.register()
AxesScript = extension.axes_script()
