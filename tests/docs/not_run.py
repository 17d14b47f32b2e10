"""The documented commands that `test_docs_runs.py` does not run, each with its reason."""

from collections.abc import Mapping
from types import MappingProxyType

PROGRAMS_NOT_RUN = (
    "docker ",  # needs a container engine; tests/serve/test_serve_deploy.py and `make image-check` look at the images
    "kubectl ",  # needs a cluster; the tests of deploy/ check the files
    "make ",  # targets of this repository: some take hours, and others change the environment of the tests
    "pip ",  # changes the environment, or downloads
    "python -m benchmarks.",  # hours, or data that are not here, but for `captions`
    "python -m refract.pipeline.retraining.flow ",  # needs Metaflow, Kubernetes and Argo
    "python -m http.server ",  # serves until it is stopped; test_pipeline_export_web.py serves an export
    "mlflow ",  # MLflow's own servers; tests/pipeline/test_pipeline_mlflow_model.py starts `mlflow models serve`
)
"""Beginnings of commands that other programs run."""

NOT_RUN: Mapping[str, str] = MappingProxyType(
    {
        "MLFLOW_TRACKING_URI=http://mlflow:5000 refract retrain photos.yaml": "needs a team's MLflow server; runs without the variable",
        "refract embed photos/ --model timm/tf_efficientnet_lite0 --weights default -o features/": "the tutorial few-images.md runs it",
        "refract export runs/NAME/bundle --to hf -o exported/hf": "needs a network of timm; test_pipeline_export.py loads one by timm",
        "refract export runs/NAME/bundle --to web -o exported/web": "loads a npm package; see test_pipeline_export_web.py",
        "refract export runs/NAME/bundle --to web --runtime onnxruntime-web-1.30.0.tgz -o exported/web": "needs that archive; see the same",
        "refract feedback labels.csv --url http://a:8000 --url http://b:8000": "needs two servers; runs with one",
        "refract lab": "23 seconds of a core; test_pipeline_lab.py runs each experiment",
        "refract labels log postgresql://ann@db.example.com/labels": "needs that database; test_pipeline_postgres.py has one",
        "refract paraphrase captions.csv --from en --via de,fr --n 3 --cache paraphrases.db": "downloads translation models; "
        "test_pipeline_paraphrase.py has small ones",
        "refract replay-batch runs/NAME/bad-batch.pt": "needs a training that diverged; test_pipeline_build.py has one",
        "refract retrain photos.yaml --resume": "needs an interrupted run; test_pipeline_retrain_command.py interrupts some",
        'refract schedule photos.yaml --cron "0 2 * * 0" --on-labels 200': "needs data.labels; see test_pipeline_triggers.py",
        "refract schedule photos.yaml --on-labels 200": "needs data.labels; see test_pipeline_triggers.py",
        'refract schedule photos.yaml --cron "0 2 * * *"': "the same with a time zone, which runs",
        "refract schedule photos.yaml --on-drift captured": "its first check measures drift; see test_pipeline_triggers.py",
        "refract schedule photos.yaml --on-drift log": "the same as with the folder captured",
        "refract score runs/NAME/bundle /shared/photos/ -o /shared/scores.parquet --engine ray": "needs a Ray cluster",
        "refract score runs/NAME/bundle new.csv -o scores.parquet --jobs 8 --batch-size 128": "eight processes that import PyTorch",
        "refract score runs/NAME/bundle photos/ -o scores.parquet": "the same as with --embeddings, which runs",
        "refract serve models:/photos@champion": "the same with a challenger, which runs",
        "refract serve runs/NAME/bundle --device all": "needs a GPU; tests/serve/test_serve_gpu.py has the selection of devices",
        "refract torchrun --nproc-per-node 4 train --resume runs/NAME": "test_pipeline_ranks.py resumes on other numbers of ranks",
        "refract torchrun --nproc-per-node 8 train photos.yaml --trainer.strategy fsdp": "needs 8 GPUs, and a test has 2 ranks",
        "refract torchrun --nnodes 16 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint node-0:29400 --rdzv-id photos "
        "--max-restarts 3 train photos.yaml --resume auto": "needs 16 machines; test_pipeline_ranks.py has two hosts",
        "refract shrink runs/NAME/bundle --budget-ms 5 -o small/": "trains several networks; test_pipeline_shrink.py trains small ones",
        "refract shrink runs/large/bundle --budget-ms 1 --networks lenet5 resnet20:16 -o small": "minutes of a core; see the line above",
        "refract train configs/digits.yaml --model.name resnet20 --trainer.max_epochs 6 --tracking.enabled false "
        "--trainer.run_name large": "the bundle of `refract shrink runs/large/bundle`, which does not run",
        "refract train --resume runs/five": "as runs/nightly, which runs; test_pipeline_folds_training.py resumes folds",
        "refract train --resume s3://bucket/runs/NAME": "needs an object store; see test_pipeline_run_copy.py",
        "refract train photos.yaml --trainer.copy_to s3://bucket/runs --resume auto": "needs an object store; see the same tests",
        "refract train --resume runs/NAME": "the same as for runs/nightly, which runs",
        "refract train photos.yaml --data.labels postgresql://ann@db.example.com/labels": "needs a PostgreSQL server",
        "refract train photos.yaml --model.mode lora": "needs a transformer; test_pipeline_lora.py trains a small one",
        "refract train photos.yaml --trainer.devices 2": "needs two GPUs; test_pipeline_training.py trains with two processes",
        "refract train photos.yaml --trainer.folds 5 --trainer.run_name five": "five trainings; see test_pipeline_folds_training.py",
        "refract train photos.yaml --trainer.folds 5": "five trainings; test_pipeline_folds_training.py has two folds",
        "refract tune photos.yaml space.yaml --trials 50 --minutes 60 --workers 2": "two more processes that import PyTorch; "
        "test_pipeline_tuning.py starts them",
    }
)
"""Command → why it is not run. An entry for a command that no page has any more fails the test."""
