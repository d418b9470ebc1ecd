"""The LoRA Merge tab in a WebUI.

The host executes this file outside ``sys.modules``, and keeps the extension's folder on ``sys.path`` only
while it does so. Therefore nothing but the import and the registration stands here.
"""

from lib_loramerge.webui import extension

extension.register()
