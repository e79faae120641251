from skipwise.cli.main import main

main()
