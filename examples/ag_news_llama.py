"""Prefix-tuning a Llama model to sort AG News: load, tokenise, configure, train, evaluate, save.

    python examples/ag_news_llama.py                                   # Llama 3.2 1B and AG News, from the hub
    python examples/ag_news_llama.py --model ./my-model --data ./ag_news   # folders of your own

A data folder holds train, validation and test as json lines, csv or parquet with the columns text and label.
"""

import argparse
from pathlib import Path

import numpy as np
from datasets import ClassLabel, DatasetDict, load_dataset
from sklearn.metrics import accuracy_score, precision_recall_fscore_support
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from foreword import PrefixClassifier, PrefixConfig, PrefixModel

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="meta-llama/Llama-3.2-1B")
parser.add_argument("--data", default="fancyzhx/ag_news")
parser.add_argument("--output", default="runs/ag_news_llama")
parser.add_argument("--train-rows", type=int, default=2000)
parser.add_argument("--test-rows", type=int, default=1000)
parser.add_argument("--max-length", type=int, default=128)
parser.add_argument("--epochs", type=float, default=1)


def load_data(name: str) -> DatasetDict:
    """Splits train and test with the columns text and label; label is a ClassLabel that knows the names."""
    data = load_dataset(name)
    if not isinstance(data["train"].features["label"], ClassLabel):
        data = data.class_encode_column("label")
    return data


def compute_metrics(prediction) -> dict[str, float]:
    predicted = np.argmax(prediction.predictions, axis=-1)
    precision, recall, f1, _ = precision_recall_fscore_support(
        prediction.label_ids, predicted, average="weighted", zero_division=0
    )
    accuracy = accuracy_score(prediction.label_ids, predicted)
    return {"accuracy": accuracy, "precision": precision, "recall": recall, "f1": f1}


def main() -> None:
    arguments = parser.parse_args()

    # 1. Load the model, which stays frozen, and the data.
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    base = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto")
    data = load_data(arguments.data)
    labels = data["train"].features["label"].names

    # 2. Configure the prefix: keys and values for every layer, started from an instruction.
    model = PrefixModel(base, tokenizer)
    instruction = f"Read the article and say what it is about: {', '.join(labels)}.\n\n"
    model.add("ag_news", PrefixConfig(form="direct", instruction=instruction))
    classifier = PrefixClassifier.for_labels(model, labels, max_length=arguments.max_length)
    print(f"{model.count():,} trained parameters, {sum(p.numel() for p in base.parameters()):,} frozen ones")

    # 3. Tokenise.
    def tokenise(batch):
        return {"input_ids": classifier.encode(batch["text"])[0], "labels": batch["label"]}

    def rows(split: str, count: int):
        part = data[split].shuffle(seed=0)
        part = part.select(range(min(count, len(part))))
        return part.map(tokenise, batched=True, remove_columns=part.column_names)

    # 4. Train. Only the prefix has gradients; checkpoints hold nothing of the base.
    trainer = Trainer(
        model=classifier,
        args=TrainingArguments(
            output_dir=f"{arguments.output}-checkpoints",
            num_train_epochs=arguments.epochs,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=32,
            learning_rate=1e-2,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            logging_steps=10,
            save_strategy="epoch",
            report_to="none",
        ),
        train_dataset=rows("train", arguments.train_rows),
        eval_dataset=rows("test", arguments.test_rows),
        data_collator=classifier.collate,
        compute_metrics=compute_metrics,
    )
    trainer.train()

    # 5. Evaluate.
    for name, value in trainer.evaluate().items():
        print(f"{name}: {value:.4f}")

    # 6. Save, load, apply.
    classifier.save_pretrained(arguments.output)
    loaded = PrefixClassifier.from_pretrained(arguments.output, PrefixModel(base, tokenizer))
    print(loaded.predict(["The central bank raised its interest rate to curb inflation."])[0]["label"])
    print("saved:", ", ".join(f"{p.name} ({p.stat().st_size:,} bytes)" for p in Path(arguments.output).iterdir()))


if __name__ == "__main__":
    main()
