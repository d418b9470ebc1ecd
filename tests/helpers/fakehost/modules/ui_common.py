import gradio as gr

from modules.ui_components import ToolButton


def create_refresh_button(refresh_component, refresh_method, refreshed_args, elem_id):
    components = refresh_component if isinstance(refresh_component, list) else [refresh_component]

    def refresh():
        refresh_method()
        values = refreshed_args() if callable(refreshed_args) else refreshed_args
        for component in components:
            for key, value in values.items():
                setattr(component, key, value)
        updates = [gr.update(**values) for _ in components]
        return updates if len(updates) > 1 else updates[0]

    button = ToolButton(value="\U0001f504", elem_id=elem_id, tooltip="Refresh")
    button.click(fn=refresh, inputs=[], outputs=components)
    return button
