from skipwise.cli import main

main()
