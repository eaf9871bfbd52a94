"""lm-eval's local-completions, unmodified: a task of generation and one of log-likelihoods.

What it saw goes to `benchmarks.clients`, which computes the same directly.
"""

import json
import os
import tempfile
from pathlib import Path

from harness import MODEL, V1, check, feature, main

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")

import lm_eval
from lm_eval.tasks import TaskManager

FACTS = [
    ("The capital of France is", [" Paris", " Rome"], 0),
    ("Two and two make", [" five", " four"], 1),
    ("The sun rises in the", [" east", " evening", " far north"], 0),
    ("Water freezes at zero degrees", [" Celsius", " of the guard"], 0),
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
"""
CHOICE = """doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
target_delimiter: ""
metric_list: [{metric: acc}]
"""
WRITTEN = """doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 12, do_sample: false, temperature: 0}
metric_list: [{metric: exact_match}]
"""


def samples(name, kind, rest):
    """The samples of one task, each (arguments of the request, what came of it) in order."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.jsonl"
        rows = [{"question": q, "choices": c, "label": label, "answer": c[label]} for q, c, label in FACTS]
        data.write_text("\n".join(map(json.dumps, rows)))
        Path(folder, f"{name}.yaml").write_text(TASK.format(name=name, data=data, kind=kind) + rest)
        how = {"model": MODEL, "base_url": f"{V1}/completions", "tokenizer": os.environ["RAPID_TOKENIZER"]}
        results = lm_eval.simple_evaluate(
            model="local-completions",
            model_args={**how, "tokenizer_backend": "huggingface", "max_length": 2048},
            tasks=[name],
            task_manager=TaskManager(include_path=folder, include_defaults=False),
            log_samples=True,
            bootstrap_iters=0,
        )
    return results["samples"][name]


@feature("log-likelihoods")
def loglikelihoods():
    found = []
    for sample in samples("facts", "multiple_choice", CHOICE):
        for (context, continuation), answer in zip(sample["arguments"], sample["filtered_resps"], strict=True):
            found.append([context, continuation, float(answer[0])])  # (log-likelihood, whether it is the greedy text)
    check(len(found), sum(len(choices) for _, choices, _ in FACTS))
    return found


@feature("generation")
def generation():
    return [[s["arguments"][0][0], s["filtered_resps"][0]] for s in samples("written", "generate_until", WRITTEN)]


main()
