"""The peer's model: onnxruntime inside MLServer, as its documentation says to write a runtime."""

from __future__ import annotations

from pathlib import Path

import onnxruntime as ort
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse


class OnnxRuntime(MLModel):
    """One session of one thread."""

    async def load(self) -> bool:
        """Make the session."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        uri = Path(self.settings.parameters.uri)
        self.session = ort.InferenceSession(uri, options, providers=["CPUExecutionProvider"])
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Run it once."""
        inputs = {each.name: NumpyCodec.decode_input(each) for each in payload.inputs}
        names = [each.name for each in self.session.get_outputs()]
        found = zip(names, self.session.run(names, inputs), strict=True)
        return InferenceResponse(
            model_name=self.name,
            outputs=[NumpyCodec.encode_output(name, value) for name, value in found],
        )
