"""StarCoderRuns with numbers that often do not go together, for properties; within types and ranges."""

from hypothesis import strategies as st

from starcoder_operator.api.v1alpha1 import PRESETS
from tests.support.runs import changed

small = st.integers(min_value=1, max_value=9)

documents = st.builds(
    lambda preset, layers, replicas, gpus, tensor, pipeline, batch, micro, sequence, length, least: changed(
        model={"preset": preset} | ({"layers": layers} if layers else {}),
        workers={"replicas": replicas, "gpusPerWorker": gpus},
        parallelism={"tensor": tensor, "pipeline": pipeline, "sequence": sequence},
        training={"iterations": 100, "globalBatchSize": batch, "microBatchSize": micro},
        data__sequenceLength=length,
        elasticity={"minReplicas": least} if least else {},
    ),
    st.sampled_from(sorted(PRESETS)),
    st.none() | small,
    small,
    small,
    st.sampled_from([1, 2, 3, 4]),
    st.sampled_from([1, 2, 3, 4]),
    st.integers(min_value=1, max_value=64),
    st.sampled_from([1, 2, 3]),
    st.booleans(),
    st.integers(min_value=1, max_value=2048),
    st.none() | small,
)
