"""Token files are Megatron's: its IndexedDataset opens ours, and we read its."""

import io

import numpy as np
import pytest

from starcoder_trainer.data.errors import DataInvalid
from starcoder_trainer.data.index import HEADER_BYTES, Header, dtype_for, read_header, write_index
from starcoder_trainer.data.token_file import TokenFileWriter

DOCUMENTS = ([1, 2, 3, 0], [4, 0], [0], [65499, 7, 0])


@pytest.fixture(scope="module")
def megatron():
    from starcoder_trainer.model import cpu

    cpu.prepare()
    from megatron.core.datasets import indexed_dataset

    return indexed_dataset


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_megatron_reads_every_document_that_we_wrote(megatron, tmp_path, dtype):
    with TokenFileWriter(tmp_path, dtype) as writer:
        writer.add(np.array([*DOCUMENTS[0], *DOCUMENTS[1]], f"<{np.dtype(dtype).str[1:]}").tobytes(), [4, 2])
        writer.add(np.array([*DOCUMENTS[2], *DOCUMENTS[3]], f"<{np.dtype(dtype).str[1:]}").tobytes(), [1, 3])
        made = writer.finish()
    found = megatron.IndexedDataset(str(tmp_path / "tokens"))
    assert [d.tolist() for d in found[:]] == [list(d) for d in DOCUMENTS]
    assert found.document_indices.tolist() == [0, 1, 2, 3, 4]
    assert found.index.dtype == np.dtype(dtype)
    assert (made.tokens, made.documents) == (10, 4)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_our_index_of_the_same_documents_is_megatrons_byte_for_byte(megatron, tmp_path, dtype):
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=getattr(np, dtype))
    for document in DOCUMENTS:
        builder.add_document(np.array(document), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    theirs = (tmp_path / "theirs.idx").read_bytes()
    ours = io.BytesIO()
    write_index(ours, dtype, [len(d) for d in DOCUMENTS])
    assert ours.getvalue() == theirs
    header = read_header(theirs[:HEADER_BYTES], "theirs.idx")
    assert header == Header(dtype, len(DOCUMENTS))
    assert header.index_bytes == len(theirs)


def test_an_index_without_documents_has_a_header_all_the_same():
    file = io.BytesIO()
    write_index(file, "uint16", [])
    assert read_header(file.getvalue(), "x").index_bytes == len(file.getvalue())


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", "no Megatron index"),
        (b"PK\x03\x04" + bytes(40), "no Megatron index"),
        (b"MMIDIDX\x00\x00" + bytes(25), "version 0"),
        (b"MMIDIDX\x00\x00" + (1).to_bytes(8, "little") + b"\x07" + bytes(16), "token type 7"),
        (b"MMIDIDX\x00\x00" + (1).to_bytes(8, "little") + b"\x08" + bytes(16), "0 document boundaries"),
    ],
)
def test_what_is_no_index_of_ours_is_refused_with_what_was_found(data, found):
    with pytest.raises(DataInvalid, match=found):
        read_header(data, "x.idx")


def test_tokens_take_two_bytes_where_the_vocabulary_fits():
    assert dtype_for(49152) == "uint16"
    assert dtype_for(65536) == "int32"
