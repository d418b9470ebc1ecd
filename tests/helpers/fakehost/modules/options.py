from modules.shared_cmd_options import cmd_opts


class OptionInfo:
    def __init__(
        self,
        default=None,
        label="",
        component=None,
        component_args=None,
        onchange=None,
        section=None,
        refresh=None,
    ):
        self.default = default
        self.label = label
        self.component = component
        self.component_args = component_args
        self.onchange = onchange
        self.section = section
        self.refresh = refresh
        self.comment_after = ""

    def info(self, text):
        self.comment_after += f"({text})"
        return self


_FIELDS = {"data_labels", "data"}


class Options:
    def __init__(self, data_labels, data):
        self.data_labels = data_labels
        self.data = data

    def __setattr__(self, key, value):
        if key in _FIELDS:
            object.__setattr__(self, key, value)
            return
        assert not cmd_opts.freeze_settings, "changing settings is disabled"
        self.data[key] = value

    def __getattr__(self, key):
        if key in _FIELDS:
            raise AttributeError(key)
        if key in self.data:
            return self.data[key]
        if key in self.data_labels:
            return self.data_labels[key].default
        raise AttributeError(key)

    def add_option(self, key, info):
        self.data_labels[key] = info
        self.data.setdefault(key, info.default)
