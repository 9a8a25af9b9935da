"""The names of a checkpoint's tokenizer files. No imports: a machine that only runs benchmarks lacks `tokenizers`."""

CONFIG, SPECIAL_MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
CHAT_TEMPLATE, CHAT_TEMPLATES, OLD_CHAT_TEMPLATE = (
    "chat_template.jinja", "additional_chat_templates", "chat_template.json"
)  # fmt: skip
TOKENIZER, MODEL, TIKTOKEN, VOCAB, MERGES = (
    "tokenizer.json", "tokenizer.model", "tiktoken.model", "vocab.json", "merges.txt"
)  # fmt: skip
# Files of a model of the hub that a tokenizer may need.
TOKENIZER_FILES = (
    "config.json", CONFIG, SPECIAL_MAP, ADDED, CHAT_TEMPLATE, OLD_CHAT_TEMPLATE,
    f"{CHAT_TEMPLATES}/*.jinja", TOKENIZER, MODEL, TIKTOKEN, "*.tiktoken", VOCAB, MERGES,
)  # fmt: skip
