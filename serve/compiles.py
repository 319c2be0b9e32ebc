"""Whether a grammar can be compiled within limits: a process of its own, told the grammar through its input.

    python -I serve/compiles.py SECONDS BYTES < {"kind": …, "text": …}

Some schemas of a few hundred letters take for ever and all memory there is (patterns that must all match, say), and
nothing can stop a compiler that runs in a thread. Here the system does: the process is ended beyond its limits. It
prints what is wrong with the grammar, if anything, and imports nothing but llguidance, so that it starts at once.
"""

import json
import os
import resource
import sys

import llguidance


def main() -> None:
    seconds, size = int(sys.argv[1]), int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.nice(5)  # answers go before
    asked = json.load(sys.stdin)
    try:
        grammar = compiled(asked["kind"], asked["text"])
    except ValueError as error:
        print(error)
        return
    # What is costly is the same for every tokenizer, and that of single bytes is there at once.
    matcher = llguidance.LLMatcher(llguidance.LLTokenizer("byte"), grammar, log_level=0)
    print(matcher.get_error())


def compiled(kind: str, text: str) -> str:
    """The grammar in llguidance's own form.

    Raises:
        ValueError: it is none.
    """
    if kind == "lark":
        return llguidance.LLMatcher.grammar_from_lark(text)
    # Without white space, which a small model may go on with for ever.
    return llguidance.LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_flexible": False})


if __name__ == "__main__":
    main()
