import argparse

from hosted_tinker.pytorch_worker.worker import Worker


def main() -> None:
    parser = argparse.ArgumentParser(description="Started by hosted-tinker-server, never by hand.")
    for lane in ("control", "training", "sampling"):
        parser.add_argument(f"--{lane}-fd", type=int, required=True, help=f"inherited stream of the {lane} lane")
    arguments = parser.parse_args()
    Worker(arguments.control_fd, arguments.training_fd, arguments.sampling_fd).run()


main()
