"""Samples of loader workers: packing and pickling loses nothing that a worker reads."""

import pickle

from hypothesis import given
from hypothesis import strategies as st

from refract.pipeline.data.manifest import Sample
from refract.pipeline.data.packed_samples import PackedSamples

TEXTS = st.text(st.characters(), max_size=20)
NAMES = TEXTS | st.binary(max_size=20).map(lambda name: name.decode("utf-8", "surrogateescape"))
SAMPLES = st.builds(
    Sample, NAMES, st.just((1,)), text=TEXTS, data=st.none() | st.binary(max_size=20), has_image=st.booleans()
)


@given(st.lists(SAMPLES, min_size=1))
def test_workers_receive_paths_texts_and_bytes(samples: list[Sample]) -> None:
    packed = pickle.loads(pickle.dumps(PackedSamples(samples)))
    assert len(packed) == len(samples)
    for index, sample in enumerate(samples):
        received = packed[index]
        assert (received.path, received.text, received.has_image) == (sample.path, sample.text, sample.has_image)
        assert received.data == sample.data


def test_a_row_takes_little_more_than_its_path() -> None:
    samples = [Sample(f"/data/photos/train/cat/{number:07}.jpg", (0,), "train") for number in range(10_000)]
    assert len(pickle.dumps(PackedSamples(samples))) < 10_000 * (len(samples[0].path) + 16)
