from jmedlora.cli import main

main()
