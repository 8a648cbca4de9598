from hosted_tinker.cli import main

if __name__ == "__main__":
    main()
