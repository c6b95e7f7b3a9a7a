"""What tasks share whose rows are one text, or a pair of texts that a model reads at once (Devlin et al. 2018, arXiv:1810.04805 §3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pipeline.tasks.base import Row, Task
from pipeline.tasks.batches import EncodedTexts, encode
from pipeline.tasks.files import text_of
from pipeline.tasks.heads import head_shape
from runtimes.errors import BadInput

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class TextOrPair(Task):
    """One text, or a pair of texts, as one input."""

    text_column: str = "text"
    """Column of the text."""
    pair_column: str | None = None
    """Column of the second text, where rows are pairs."""
    pooling: Literal["first", "mean"] = "first"
    """What the head reads: the first token through the pooler, as BERT was made, or the mean over all tokens, as sentence encoders were trained.
    The first token alone is cheaper: the last layer need not be computed for the others."""

    @property
    def segments(self) -> int:
        return len(self.columns)

    @property
    def columns(self) -> tuple[str, ...]:
        return ("text",) if self.pair_column is None else ("text", "text_pair")

    def texts_row(self, record: dict[str, Any], place: str) -> Row:
        """The texts of a record of a file; BadInput if one is missing."""
        row = {"text": text_of(record, self.text_column, place)}
        return row if self.pair_column is None else row | {"text_pair": text_of(record, self.pair_column, place)}

    def encode_texts(self, tokenizer: Tokenizer, rows: Sequence[Row], pad_id: int) -> EncodedTexts:
        """Rows -> inputs without targets."""
        texts = [row["text"] if self.pair_column is None else (row["text"], row["text_pair"]) for row in rows]
        return encode(tokenizer, texts, self.max_length, pad_id)

    def text_head(self, size: int) -> dict[str, Any]:
        """A head with ``size`` outputs under the name ``logits``."""
        return head_shape("classifier", ["logits"], self.pooling, size, pooler=self.pooling == "first")

    def unlabeled_row(self, line: str) -> Row:
        """One text; of a pair both, with a tab between them."""
        if self.pair_column is None:
            return {"text": line}
        first, separator, second = line.partition("\t")
        if not (separator and first.strip() and second.strip()):
            raise BadInput("a line without labels must hold both texts with a tab between them")
        return {"text": first, "text_pair": second}
