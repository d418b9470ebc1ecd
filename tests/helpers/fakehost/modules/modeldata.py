"""SD.Next's model: layers that know what was applied to them by names and multipliers."""


class Layer:
    def __init__(self):
        self.network_current_names = ()
        self.content = ()


class Model:
    def __init__(self):
        self.network_layer_mapping = {"layer": Layer()}
        self.loaded_loras = {}


class ModelData:
    def __init__(self):
        self.sd_model = Model()


model_data = ModelData()
