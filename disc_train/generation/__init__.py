"""Generate a model's own texts about documents, for `disc-train`.

`rephrase`: paraphrases, records {text} for `--method ft`. `cd`: the transfer set of Padmanabhan et al. 2023 (arXiv
2306.09306), for `--method cd --temperature 1`: the model is prompted with a document to go on from it; of its
continuation the teacher reads the document in front, without the prompt's instructions, and the student nothing.
"""
