"""The documented commands that `test_docs_runs.py` runs. Each tuple is run in one folder, from the first to the last."""

FIRST_TRAINING = ("refract train photos.yaml",)
"""Its run is runs/NAME in the folders of all groups."""
AUGMENTATION = (
    "refract ops GaussianNoise",
    "refract preview photos/ --policy mine.yaml -o grid.png",
    "refract preview photos --policy mine.yaml",
    "refract preview photos.yaml -o grid.png",
    "refract explain mine.yaml photo.jpg",
    "refract augment mine.yaml photos/ out/ --copies 5 --jobs 2",
    "refract augment --replay out/plans.jsonl photos/ again/",
    "refract pack photos/ packed/ --resize 256",
    "refract pack photos.yaml checked/ --resize 256",
    "refract config keys",
    "refract config schema",
    "refract --plugin my_plugin.py count-images photos",
)
FIRST_CONFIG = (
    "refract init photos/ -o photos.yaml",
    "refract init photos/",
    "refract init photos/ --model.name resnet18 --model.weights default",
    "refract augment mine.yaml photos/ out/ --copies 5",
)
LABELS = (
    'refract labels set labels.db photos/cat/12.jpg --label dog --data photos --reason "it barks"',
    "refract labels set labels.db photos/cat/13.jpg --exclude",
    "refract labels set labels.db inbox/new.jpg --label cat --new --data photos",
    "refract labels undo labels.db 2",
    "refract labels set labels.db photos/cat/12.jpg --label dog --data photos",
    "refract labels log labels.db --since 2026-01-31 --reviewer ann",
    "refract labels log labels.db --conflicts",
    "refract labels diff labels.db --data photos",
    "refract labels diff labels.db --from 40 --to 57",
    'refract labels export labels.db labels.json --prefix "/data/local-files/?d="',
    "refract labels import labels.db project.json --data photos",
    "refract train photos.yaml --data.labels labels.db",
)
OPTIONS_OF_TRAIN = (
    "refract train photos.yaml --data.sampler balanced",
    "refract train photos.yaml --data.on_bad_file skip",
    "refract train photos.yaml --loss.class_weights balanced",
    "refract train photos.yaml --optim.head_lr 5",
    "refract train photos.yaml --trainer.patience 5",
    "refract train photos.yaml --tracking.enabled false",
)
"""Run as one command with all options."""
TRAINING = (
    "refract train photos.yaml --trainer.run_name nightly",
    "refract train --resume runs/nightly",
    "refract train photos.yaml --resume auto",
    "refract train photos.yaml --model.mode probe",
    "refract train photos.yaml --model.weights runs/NAME/bundle",
    "refract train pets.yaml --data.hierarchy classes.csv",
    "refract find lr photos.yaml",
    "refract profile photos.yaml --steps 20 --trace trace.json",
    "refract tune photos.yaml space.yaml --trials 50",
    "refract train runs/tune-photos/best.yaml",
    "refract rerun runs/NAME",
)
EVALUATION = (
    "refract evaluate runs/NAME/bundle photos/ --report report/",
    "refract evaluate runs/NAME/bundle photos/ --robustness full",
    "refract doctor runs/NAME",
    "refract compare runs/a runs/b",
    "refract compare runs/a runs/b runs/c --curves curves.png",
    "refract soup runs/a runs/b -o runs/soup",
    "refract soup runs/a runs/b runs/c -o runs/soup",
    "refract soup runs/a runs/b runs/c -o runs/soup --method uniform",
    "refract drift runs/NAME/bundle new/ --report drift/",
    "refract drift runs/NAME/bundle photos-of-today/ --report today/",
    "refract score runs/NAME/bundle photos/ -o scores.parquet --embeddings",
    "refract embed photos/ --model runs/NAME/bundle -o features/",
    "refract embed photos/ --model runs/NAME -o features/",
    "refract search features/ new.jpg",
    "refract search features/ new.jpg --top 5",
)
RETRAINING = (
    "refract retrain photos.yaml",
    "refract retrain photos.yaml --retrain.relabelled_stop null",
    "refract retrain photos.yaml --retrain.disagreement_stop null",
    "refract retrain photos.yaml --retrain.start_from champion",
    "refract rollback photos",
    "refract train photos.yaml --model.weights models:/photos@champion",
    'refract promote photos 7 --force --why "seen by hand"',
    "refract promote photos 7",
    "refract sync",
    'refract schedule photos.yaml --cron "0 2 * * *" --timezone Europe/Berlin',
    "refract schedule photos.yaml",
    "refract schedule --list",
    "refract serve models:/photos@champion --challenger models:/photos@challenger --canary 0.1",
)
TEXTS = (
    "python -m benchmarks.captions texts --kind texts",
    "refract train configs/text.yaml",
    "python -m benchmarks.captions captions",
    "refract train configs/image-text.yaml",
    'refract predict runs/NAME/bundle a.png --text "which form does it have"',
    "curl -s -F file=@a.jpg -F text='which form does it have' localhost:8000/v1/predict",
    """curl -s -H 'Content-Type: application/json' -d '{"text": "a text alone"}' localhost:8000/v1/predict""",
    "curl -s -H 'Content-Type: text/plain' -d 'a text alone' localhost:8000/v1/predict",
)
OPTIONS_OF_SERVE = (
    "refract serve runs/NAME/bundle --keys keys",
    "refract serve runs/NAME/bundle --metrics-port 9000",
    "refract serve runs/NAME/bundle --grpc-port 8001",
    "refract serve runs/NAME/bundle --cache-mb 64",
    "refract serve runs/NAME/bundle --min-familiarity 0.01",
    "refract serve runs/NAME/bundle --root-path /models",
)
"""Run as one command with all options."""
SERVING = (
    "refract serve runs/NAME/bundle --sample log/",
    "refract drift runs/NAME/bundle log/",
    "refract serve runs/NAME/bundle --sample log/ --sample-fraction 0.01 --sample-mb 100 --sample-below 0.5",
    "refract serve runs/NAME/bundle --backend int8",
    "refract predict --url http://localhost:8000 new.jpg",
    "refract feedback labels.csv --url http://localhost:8000",
)
REVIEW = (
    "refract review runs/NAME",
    "refract review photos.yaml",
    "refract review runs/photos",
    "refract review photos.yaml --host 0.0.0.0 --keys keys",
    "refract review runs/photos --unlabelled inbox --captured captured --port 8100",
    "refract review runs/photos-20260101-020000-00 --labels labels.db --captured captured",
    'curl "http://localhost:8100/api/queues/label-errors?count=5"',
    'curl "http://localhost:8100/api/decided?reviewer=ann"',
)
EXPORT = (
    "refract export runs/NAME/bundle --to onnx -o exported/onnx",
    "refract export runs/NAME/bundle --to openvino -o exported/openvino",
    "refract export runs/NAME/bundle --to torch-export -o exported/torch",
    "refract export runs/NAME/bundle --to triton -o exported/triton",
    "refract export runs/NAME/bundle --to onnx --int8 --calibrate photos/ --data photos/ -o exported/int8",
)
GROUPS = (
    FIRST_TRAINING, AUGMENTATION, FIRST_CONFIG, LABELS, OPTIONS_OF_TRAIN, TRAINING, EVALUATION, RETRAINING, TEXTS, OPTIONS_OF_SERVE,
    SERVING, REVIEW, EXPORT,
)  # fmt: skip
